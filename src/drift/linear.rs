//! What the precision of linear layers costs, product by product.

use super::layers::flat;
use super::metrics::cosine;
use super::{ErrorSums, Summary};
use crate::models::{LayeredModel, NamedLinear, forward, linear_in};
use crate::nn::{Linear, Precision};
use crate::{Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// How far the embeddings of passages are from those that a model gave before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct EmbeddingErrors {
    /// Signal-to-noise ratio over all of them, in dB.
    pub sqnr_db: f64,
    /// The lowest cosine of a passage.
    pub min_cosine: f64,
}

/// What a product costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LinearErrors {
    /// The layer of the model, counted from 0.
    pub layer: usize,
    /// Which of its products.
    pub product: String,
    /// Of the model's embeddings, with this product alone in the precision.
    pub alone: EmbeddingErrors,
    /// The same with this product and all before it.
    pub accumulated: EmbeddingErrors,
}

/// What each product of a model costs in a precision, alone and accumulated, against the model as it is.
/// Afterwards the model is as it was.
///
/// ```no_run
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::drift::linear::linear_errors;
/// use candle_int8_attention::models::{BertModel, ModelFiles};
/// use candle_int8_attention::nn::Precision;
///
/// let files = ModelFiles::from_dir("all-MiniLM-L6-v2")?;
/// let mut model = BertModel::load(&files, &Device::Cpu)?;
/// let passage = Tensor::new(&[[101u32, 7592, 2088, 102]], &Device::Cpu)?;
/// for product in linear_errors(&mut model, &[passage], Precision::Int8)? {
///     println!("{} {}: {:.1} dB", product.layer, product.product, product.alone.sqnr_db);
/// }
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`Substitutes::new`] and of the model.
pub fn linear_errors<M: LayeredModel<Input: Sized>>(
    model: &mut M,
    passages: &[M::Input],
    precision: Precision,
) -> Result<Vec<LinearErrors>> {
    let mut substitutes = Substitutes::new(model, precision)?;
    let mut sums = LinearSums::new(&substitutes);
    for passage in passages {
        sums.record(model, &mut substitutes, passage)?;
    }
    Ok(sums.errors())
}

/// The linear layers of a model, packed once more in another precision, to stand in for its own.
pub struct Substitutes {
    precision: Precision,
    /// Layer and name of every product.
    products: Vec<(usize, &'static str)>,
    linear: Vec<Linear>,
}

impl Substitutes {
    /// Packs all layers of [`LayeredModel::linear_mut`]; the model stays as it is.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model that has none whose precision can be chosen, as decoders;
    /// [`Error::Mismatch`] for one that names them in another order than that of its layers; those of
    /// [`Linear::to_precision`].
    pub fn new<M: LayeredModel>(model: &mut M, precision: Precision) -> Result<Self> {
        let layers = model.attention().len();
        let all = model.linear_mut();
        let products: Vec<_> =
            all.iter().map(|NamedLinear { layer, name, .. }| (*layer, *name)).collect();
        if products.is_empty() {
            return Err(Error::Unsupported(
                "a model that has no linear layer whose precision can be chosen".into(),
            ));
        }
        if !products.is_sorted_by_key(|(layer, _)| layer)
            || products[products.len() - 1].0 >= layers
        {
            return Err(Error::Mismatch(format!(
                "linear layers {products:?}, expected those of layers 0 to {layers} in their order"
            )));
        }
        let linear = linear_in(model, &vec![precision; products.len()])?;
        Ok(Self { precision, products, linear })
    }

    /// Their precision.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Layer and name of every product, in the order of [`LayeredModel::linear_mut`].
    pub fn products(&self) -> &[(usize, &'static str)] {
        &self.products
    }

    /// Puts a product's substitute into the model, and what was there into its place.
    pub(super) fn swap<M: LayeredModel>(&mut self, model: &mut M, product: usize) {
        std::mem::swap(&mut self.linear[product], model.linear_mut()[product].linear);
    }
}

/// What products cost over any number of passages, in constant memory; parts of a text merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinearSums {
    precision: Precision,
    products: Vec<ProductSums>,
}

/// Of one product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct ProductSums {
    layer: usize,
    product: String,
    alone: EmbeddingSums,
    accumulated: EmbeddingSums,
}

/// Of the embeddings.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct EmbeddingSums {
    errors: ErrorSums,
    /// One a passage.
    cosine: Summary,
}

impl EmbeddingSums {
    fn push(&mut self, reference: &[f32], candidate: &[f32]) -> Result<()> {
        self.errors.push(reference, candidate)?;
        self.cosine.push(cosine(reference, candidate)?);
        Ok(())
    }

    fn merge(&mut self, other: &Self) {
        self.errors.merge(&other.errors);
        self.cosine.merge(&other.cosine);
    }

    fn errors(&self) -> EmbeddingErrors {
        EmbeddingErrors { sqnr_db: self.errors.sqnr_db(), min_cosine: self.cosine.min() }
    }
}

impl LinearSums {
    /// No passage yet.
    pub fn new(substitutes: &Substitutes) -> Self {
        let product = |&(layer, product): &(usize, &str)| ProductSums {
            layer,
            product: product.to_string(),
            alone: EmbeddingSums::default(),
            accumulated: EmbeddingSums::default(),
        };
        let products = substitutes.products.iter().map(product).collect();
        Self { precision: substitutes.precision, products }
    }

    /// The precision that is compared with the model's own.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// How many passages were recorded.
    pub fn passages(&self) -> u64 {
        self.products.first().map_or(0, |sums| sums.alone.cosine.count())
    }

    /// The figures of everything recorded so far.
    pub fn errors(&self) -> Vec<LinearErrors> {
        let of = |sums: &ProductSums| LinearErrors {
            layer: sums.layer,
            product: sums.product.clone(),
            alone: sums.alone.errors(),
            accumulated: sums.accumulated.errors(),
        };
        self.products.iter().map(of).collect()
    }

    /// Runs a passage with each product substituted, alone and with all before it. Afterwards the model is as
    /// it was.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for substitutes of other products or another precision than those it began with;
    /// those of the model. Nothing of the passage is counted then.
    pub fn record<M: LayeredModel>(
        &mut self,
        model: &mut M,
        substitutes: &mut Substitutes,
        passage: &M::Input,
    ) -> Result<()> {
        let mut sums = Self::new(substitutes);
        self.check_same(&sums)?;
        let count = substitutes.products.len();
        let inputs = Inputs::of(model, passage)?;
        for product in 0..count {
            substitutes.swap(model, product);
            let layer = substitutes.products[product].0;
            let found = embedding_from(model, layer, &inputs.hidden[layer]);
            substitutes.swap(model, product);
            sums.products[product].alone.push(&inputs.embedding, &found?)?;
        }
        let (mut hidden, mut next) = (inputs.hidden[0].clone(), 0);
        let mut swapped = 0;
        let all = (0..count).try_for_each(|product| {
            // All products of the layers before this one's are substituted.
            while next < substitutes.products[product].0 {
                hidden = forward(model, next, &hidden)?;
                next += 1;
            }
            substitutes.swap(model, product);
            swapped += 1;
            let found = embedding_from(model, next, &hidden)?;
            sums.products[product].accumulated.push(&inputs.embedding, &found)
        });
        (0..swapped).for_each(|product| substitutes.swap(model, product));
        all?;
        self.add(&sums);
        Ok(())
    }

    /// Adds what was gathered from other passages.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for another precision or other products; nothing is changed then.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.check_same(other)?;
        self.add(other);
        Ok(())
    }

    fn add(&mut self, other: &Self) {
        for (sums, other) in self.products.iter_mut().zip(&other.products) {
            sums.alone.merge(&other.alone);
            sums.accumulated.merge(&other.accumulated);
        }
    }

    fn check_same(&self, other: &Self) -> Result<()> {
        let of = |sums: &Self| {
            let products = sums.products.iter().map(|x| (x.layer, x.product.clone()));
            (sums.precision, products.collect::<Vec<_>>())
        };
        let (this, that) = (of(self), of(other));
        if this.0 != that.0 {
            return Err(Error::Mismatch(format!("linear layers in {} and in {}", this.0, that.0)));
        }
        if this.1 != that.1 {
            return Err(Error::Mismatch(format!(
                "linear layers of different models: {:?} and {:?}",
                this.1, that.1
            )));
        }
        Ok(())
    }

    /// Refuses what no passages of a model of so many layers add up to: for what was read from a file.
    #[cfg(feature = "drift")]
    pub(super) fn check(&self, passages: u64, layers: usize) -> std::result::Result<(), String> {
        if self.products.is_empty() {
            return Err("no linear layer was measured".into());
        }
        for (index, sums) in self.products.iter().enumerate() {
            let ProductSums { layer, product, alone, accumulated } = sums;
            let same = |other: &ProductSums| (other.layer, &other.product) == (*layer, product);
            if *layer >= layers || self.products[..index].iter().any(same) {
                return Err(format!("a linear layer {product:?} in layer {layer} of {layers}"));
            }
            for EmbeddingSums { errors, cosine } in [alone, accumulated] {
                errors.check()?;
                cosine.check()?;
                if cosine.count() != passages {
                    return Err(format!(
                        "{} values of {passages} passages for the linear layer {product:?} in layer \
                         {layer}",
                        cosine.count()
                    ));
                }
            }
        }
        Ok(())
    }
}

/// What enters every layer of a model as it is, and what it says in the end.
struct Inputs {
    hidden: Vec<Tensor>,
    embedding: Vec<f32>,
}

impl Inputs {
    fn of<M: LayeredModel>(model: &M, passage: &M::Input) -> Result<Self> {
        let mut hidden = vec![model.embed(passage)?];
        for layer in 0..model.attention().len() {
            hidden.push(forward(model, layer, &hidden[layer])?);
        }
        let embedding = flat(&model.embedding(&hidden[hidden.len() - 1])?)?;
        Ok(Self { hidden, embedding })
    }
}

/// What the model says of what enters a layer.
fn embedding_from<M: LayeredModel>(model: &M, layer: usize, hidden: &Tensor) -> Result<Vec<f32>> {
    let mut hidden = hidden.clone();
    for layer in layer..model.attention().len() {
        hidden = forward(model, layer, &hidden)?;
    }
    flat(&model.embedding(&hidden)?)
}
