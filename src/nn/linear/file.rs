//! Packed layers in a safetensors file.
//!
//! ```text
//! metadata  "int8-linear"    JSON: version, and of each layer its name, precision, outputs and inputs
//! tensors   "<name>.codes"   I8   [panels, groups, nr, group]   of int8: as the kernel reads them
//!           "<name>.scales"  F32  [outputs]                     of int8
//!           "<name>.weight"  F32  [outputs, inputs]             of f32 and int16, which are packed in a pass
//!           "<name>.bias"    F32  [outputs]
//! ```
//!
//! Codes are stored in the order of the machine that wrote them, which the shape tells. Where the machine
//! that reads them has the same, they are taken as they are; otherwise they are put in order, and the layer
//! has the same bits.

use super::int8::Int8Weights;
use super::layer::{Form, Linear};
use super::weights::{Precision, Weights};
use crate::cpu::Level;
use crate::files::{self, corrupt};
use crate::{Error, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The key of the metadata, and what says that a file is one of packed layers.
const KEY: &str = "int8-linear";

/// Of this version of the format.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    layers: BTreeMap<String, LayerHeader>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerHeader {
    precision: Precision,
    outputs: usize,
    inputs: usize,
}

/// Writes layers by name, as they are packed; [`load_linear`] has them back, bit for bit, without rotating
/// and rounding again.
///
/// # Errors
/// [`Error::Unsupported`] for a layer that is left to Candle (on another device, in another dtype, or with
/// variables as its weights), [`Error::InvalidArgument`] for a name that comes twice, [`Error::Io`] if the
/// file cannot be written; what was there before is still there then.
pub fn save_linear<'a>(
    path: impl AsRef<Path>,
    layers: impl IntoIterator<Item = (&'a str, &'a Linear)>,
) -> Result<()> {
    let mut header = Header { version: VERSION, layers: BTreeMap::new() };
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, layer) in layers {
        let Form::Fused(packed) = &layer.0 else {
            return Err(Error::Unsupported(format!(
                "layer {name:?} is not packed, expected f32 weights on the CPU that are no variables"
            )));
        };
        let (outputs, inputs) = layer.shape();
        let precision = layer.precision();
        let about = LayerHeader { precision, outputs, inputs };
        if header.layers.insert(name.to_string(), about).is_some() {
            return Err(Error::InvalidArgument(format!("two layers with the name {name:?}")));
        }
        let mut add = |part: &str, dtype, shape: &[usize], bytes| {
            tensors.push((format!("{name}.{part}"), dtype, shape.to_vec(), bytes));
        };
        match &packed.weights {
            Weights::Float(_) | Weights::Int16(_) => {
                let weights = le_bytes(&packed.weights.unpacked());
                add("weight", Dtype::F32, &[outputs, inputs], weights);
            }
            Weights::Int8(weights) => {
                let (layout, codes) = weights.packed();
                add("codes", Dtype::I8, &layout, codes.to_vec());
                add("scales", Dtype::F32, &[outputs], le_bytes(weights.scales()));
            }
        }
        add("bias", Dtype::F32, &[outputs], le_bytes(packed.bias()));
    }
    let refused = |e: &dyn std::fmt::Display| Error::Unsupported(format!("safetensors: {e}"));
    let json = serde_json::to_string(&header).map_err(|e| refused(&e))?;
    let mut views = Vec::with_capacity(tensors.len());
    for (name, dtype, shape, bytes) in &tensors {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| refused(&e))?;
        views.push((name.clone(), view));
    }
    let metadata = HashMap::from([(KEY.to_string(), json)]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| refused(&e))?;
    files::write(path.as_ref(), &bytes)
}

/// Reads what [`save_linear`] wrote: the layers by name.
///
/// # Errors
/// [`Error::MissingFile`] or [`Error::Io`] if the file cannot be read, [`Error::Corrupt`] if it is not such
/// a file, [`Error::Level`] for a forced level that cannot be used.
pub fn load_linear(path: impl AsRef<Path>) -> Result<BTreeMap<String, Linear>> {
    let path = path.as_ref();
    let bytes = files::read("packed layers", path)?;
    let level = Level::active()?;
    read(&bytes, level).map_err(|problem| corrupt(path, problem))
}

/// Problems are sentences without the path.
fn read(bytes: &[u8], level: Level) -> std::result::Result<BTreeMap<String, Linear>, String> {
    let text = |e: safetensors::SafeTensorError| e.to_string();
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(text)?;
    let json = (metadata.metadata().as_ref().and_then(|all| all.get(KEY)))
        .ok_or_else(|| format!("no {KEY:?} in the metadata, expected a file of packed layers"))?;
    let header: Header = serde_json::from_str(json).map_err(|e| e.to_string())?;
    if header.version != VERSION {
        return Err(format!("format version {}, expected {VERSION}", header.version));
    }
    let reader = Reader(SafeTensors::deserialize(bytes).map_err(text)?);
    let layer = |(name, about): (String, LayerHeader)| {
        let layer = reader.layer(level, &name, &about)?;
        Ok((name, layer))
    };
    header.layers.into_iter().map(layer).collect()
}

struct Reader<'a>(SafeTensors<'a>);

impl Reader<'_> {
    fn layer(
        &self,
        level: Level,
        name: &str,
        about: &LayerHeader,
    ) -> std::result::Result<Linear, String> {
        let LayerHeader { precision, outputs, inputs } = *about;
        // First: weights without inputs have no bytes that bear their outputs out.
        let bias = self.f32(&format!("{name}.bias"), &[outputs])?;
        let weights = match precision {
            Precision::F32 | Precision::Int16 => {
                let weights = self.f32(&format!("{name}.weight"), &[outputs, inputs])?;
                let weights = Weights::new(level, precision, &weights, (outputs, inputs));
                weights.map_err(|e| format!("layer {name:?}: {e}"))?
            }
            Precision::Int8 => {
                let codes = format!("{name}.codes");
                let view = self.tensor(&codes, Dtype::I8)?;
                let layout = <[usize; 4]>::try_from(view.shape())
                    .ok()
                    .filter(|layout| is_room(*layout, (outputs, inputs)))
                    .ok_or_else(|| {
                        format!(
                            "tensor {codes:?} has shape {:?}, expected [panels, groups, nr, group] \
                             for [{outputs}, {inputs}]",
                            view.shape()
                        )
                    })?;
                let scales = self.f32(&format!("{name}.scales"), &[outputs])?;
                if let Some(scale) = scales.iter().find(|scale| !is_scale(**scale)) {
                    return Err(format!("layer {name:?} has a scale of {scale}"));
                }
                check_codes(view.data(), layout, (outputs, inputs))
                    .map_err(|problem| format!("tensor {codes:?} has {problem}"))?;
                let packed = (layout, view.data());
                let weights = Int8Weights::from_packed(level, packed, scales, inputs);
                Weights::Int8(weights.map_err(|e| format!("layer {name:?}: {e}"))?)
            }
        };
        Ok(Linear::packed(weights, &bias))
    }

    fn tensor(&self, name: &str, dtype: Dtype) -> std::result::Result<TensorView<'_>, String> {
        let view = self.0.tensor(name).map_err(|_| format!("no tensor named {name:?}"))?;
        match view.dtype() == dtype {
            true => Ok(view),
            false => Err(format!("tensor {name:?} is {}, expected {dtype}", view.dtype())),
        }
    }

    fn f32(&self, name: &str, shape: &[usize]) -> std::result::Result<Vec<f32>, String> {
        let view = self.tensor(name, Dtype::F32)?;
        if view.shape() != shape {
            let found = view.shape();
            return Err(format!("tensor {name:?} has shape {found:?}, expected {shape:?}"));
        }
        Ok(view.data().as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect())
    }
}

/// Whether panels and groups are as many as there have to be.
fn is_room([panels, groups, nr, group]: [usize; 4], (outputs, inputs): (usize, usize)) -> bool {
    nr > 0 && group > 0 && panels == outputs.div_ceil(nr) && groups == inputs.div_ceil(group)
}

/// Of finite weights, or NaN for an output whose weights are not.
fn is_scale(scale: f32) -> bool {
    scale.is_nan() || scale > 0.0 && scale.is_finite()
}

/// That codes are those of symmetric quantization, and that zeros follow the last output and the last input:
/// in the depth, kernels multiply them with whatever lies behind a row.
fn check_codes(
    codes: &[u8],
    [_, groups, nr, group]: [usize; 4],
    (outputs, inputs): (usize, usize),
) -> std::result::Result<(), &'static str> {
    if codes.contains(&i8::MIN.cast_unsigned()) {
        return Err("a code of -128");
    }
    let zeros_behind = |(index, codes): (usize, &[u8])| {
        let (panel, place) = (index / (groups * nr), index % (groups * nr));
        let is_output = panel * nr + place % nr < outputs;
        let inside = if is_output { inputs.saturating_sub(place / nr * group) } else { 0 };
        codes.iter().skip(inside).all(|&code| code == 0)
    };
    match codes.chunks_exact(group).enumerate().all(zeros_behind) {
        true => Ok(()),
        false => Err("codes beyond its outputs and inputs"),
    }
}

fn le_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::runnable;
    use crate::testing::{largest_difference, randn};
    use candle_core::{DType, Device, Var};

    fn layer(level: Level, precision: Precision, (outputs, inputs): (usize, usize)) -> Linear {
        let weights: Vec<f32> = randn(&[outputs * inputs]).to_vec1().unwrap();
        let weights = Weights::new(level, precision, &weights, (outputs, inputs)).unwrap();
        Linear::packed(weights, &randn(&[outputs]).to_vec1::<f32>().unwrap())
    }

    /// Whatever level wrote it, and whatever level reads it.
    #[test]
    fn layers_come_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layers.safetensors");
        for (level, other) in runnable().into_iter().zip(runnable().into_iter().rev()) {
            for shape in [(70, 33), (1, 1), (64, 128), (3, 0), (0, 5)] {
                let int8 = layer(level, Precision::Int8, shape);
                let f32 = layer(level, Precision::F32, shape);
                save_linear(&path, [("a.int8", &int8), ("a.f32", &f32)]).unwrap();
                let bytes = std::fs::read(&path).unwrap();
                for reader in [level, other] {
                    let found = read(&bytes, reader).unwrap();
                    let names: Vec<&str> = found.keys().map(String::as_str).collect();
                    assert_eq!(names, ["a.f32", "a.int8"]);
                    let x = randn(&[5, shape.1]);
                    let same = &found["a.int8"];
                    assert_eq!(same.precision(), Precision::Int8);
                    let off = |a: &Linear, b: &Linear| {
                        let (a, b) = (a.forward(&x).unwrap(), b.forward(&x).unwrap());
                        if shape.0 == 0 { 0.0 } else { largest_difference(&a, &b) }
                    };
                    assert_eq!(off(same, &int8), 0.0, "{level:?} {reader:?} {shape:?}");
                    assert!(off(&found["a.f32"], &f32) < 1e-4, "{level:?} {reader:?} {shape:?}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_saved_is_refused() {
        let path = Path::new("no/such/folder/file");
        let variable = Var::from_tensor(&randn(&[2, 2])).unwrap();
        let candle = Linear::new(&variable, None, Precision::Int8).unwrap();
        let error = save_linear(path, [("a", &candle)]).unwrap_err().to_string();
        assert!(error.contains("layer \"a\" is not packed"), "{error}");
        let packed = Linear::new(&randn(&[2, 2]), None, Precision::Int8).unwrap();
        let error = save_linear(path, [("a", &packed), ("a", &packed)]).unwrap_err().to_string();
        assert!(error.contains("two layers with the name \"a\""), "{error}");
        assert!(matches!(save_linear(path, [("a", &packed)]), Err(Error::Io { .. })));
    }

    /// Behind the last input of an output kernels read on, where a row has what an earlier call left.
    #[test]
    fn codes_behind_the_last_input_are_refused() {
        for (layout, inputs) in [([1, 2, 2, 4], 5), ([1, 1, 2, 4], 3), ([2, 1, 1, 2], 1)] {
            let [panels, groups, nr, group] = layout;
            let mut codes = vec![0u8; panels * groups * nr * group];
            let shape = (2, inputs);
            assert_eq!(check_codes(&codes, layout, shape), Ok(()));
            for at in 0..codes.len() {
                codes[at] = 7;
                let input = at / (nr * group) % groups * group + at % group;
                let found = check_codes(&codes, layout, shape);
                assert_eq!(found.is_ok(), input < inputs, "{layout:?} {at}");
                codes[at] = 0;
            }
        }
    }

    /// Weights without inputs have no bytes, whatever the outputs; and the other way around.
    #[test]
    fn sizes_that_no_bytes_bear_out_are_refused_at_once() {
        for precision in [Precision::F32, Precision::Int16, Precision::Int8] {
            for (outputs, inputs) in [(1 << 40, 0), (usize::MAX, 0), (0, 1 << 60), (0, 1 << 48)] {
                let about = LayerHeader { precision, outputs, inputs };
                let layers = BTreeMap::from([("a".to_string(), about)]);
                let json = serde_json::to_string(&Header { version: VERSION, layers }).unwrap();
                let of = |dtype, shape: &[usize]| TensorView::new(dtype, shape.to_vec(), &[]);
                let tensors = [
                    ("a.weight", of(Dtype::F32, &[outputs, inputs]).unwrap()),
                    ("a.codes", of(Dtype::I8, &[0, 0, 1, 4]).unwrap()),
                    ("a.scales", of(Dtype::F32, &[0]).unwrap()),
                    ("a.bias", of(Dtype::F32, &[0]).unwrap()),
                ];
                let metadata = HashMap::from([(KEY.to_string(), json)]);
                let bytes = safetensors::serialize(tensors, Some(metadata)).unwrap();
                for level in runnable() {
                    // An output that is not there may have any inputs that memory has addresses for.
                    let is_nothing = precision != Precision::Int8 && inputs == 1 << 48;
                    let found = read(&bytes, level);
                    assert_eq!(found.is_ok(), is_nothing, "{precision:?} {outputs} {inputs}");
                }
            }
        }
    }

    /// The file with another header, with a tensor in another shape or dtype, or with other numbers.
    #[test]
    fn damaged_files_say_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layers.safetensors");
        let level = Level::active().unwrap();
        save_linear(&path, [("a", &layer(level, Precision::Int8, (3, 4)))]).unwrap();
        let good = std::fs::read(&path).unwrap();
        let fails = |bytes: &[u8], problem: &str| {
            std::fs::write(&path, bytes).unwrap();
            let error = load_linear(&path).err().unwrap();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
            assert!(error.to_string().contains(problem), "{error}");
        };
        fails(&good[..good.len() / 2], "");
        let file = SafeTensors::deserialize(&good).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&good).unwrap();
        let header = metadata.metadata().as_ref().unwrap()[KEY].clone();
        let rewritten = |header: &str, without: &str| {
            let tensors = file.tensors().into_iter().filter(|(name, _)| name != without);
            let metadata = HashMap::from([(KEY.to_string(), header.to_string())]);
            safetensors::serialize(tensors, Some(metadata)).unwrap()
        };
        fails(&rewritten("{}", ""), "missing field");
        fails(&rewritten(&header.replace(":1,", ":2,"), ""), "version 2, expected 1");
        fails(&rewritten(&header.replace("\"inputs\":4", "\"inputs\":400"), ""), "for [3, 400]");
        let wider = header.replace("\"outputs\":3", "\"outputs\":4");
        fails(&rewritten(&wider, ""), "has shape [3], expected [4]");
        fails(&rewritten(&header, "a.bias"), "no tensor named \"a.bias\"");
        let changed = |name: &str, change: &dyn Fn(&mut [u8])| {
            let tensors = file.tensors();
            let mut data =
                tensors.iter().find(|(found, _)| found == name).unwrap().1.data().to_vec();
            change(&mut data);
            let view = |(found, view): &(String, TensorView<'_>)| {
                let data = if found == name { data.clone() } else { view.data().to_vec() };
                (found.clone(), (view.dtype(), view.shape().to_vec(), data))
            };
            let tensors: Vec<_> = tensors.iter().map(view).collect();
            let views = tensors.iter().map(|(name, (dtype, shape, data))| {
                (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
            });
            let metadata = HashMap::from([(KEY.to_string(), header.clone())]);
            safetensors::serialize(views, Some(metadata)).unwrap()
        };
        for scale in [0.0, -1.0, f32::INFINITY] {
            let set = |data: &mut [u8]| data[4..8].copy_from_slice(&f32::to_le_bytes(scale));
            fails(&changed("a.scales", &set), &format!("a scale of {scale}"));
        }
        fails(&changed("a.codes", &|data| data[1] = 0x80), "a code of -128");
        // Behind the last output: there are 3 in a panel of more.
        fails(&changed("a.codes", &|data| *data.last_mut().unwrap() = 1), "codes beyond its");
        let zeros = candle_core::Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        candle_core::safetensors::save(&HashMap::from([("a.bias", zeros)]), &path).unwrap();
        let error = load_linear(&path).err().unwrap().to_string();
        assert!(error.contains("expected a file of packed layers"), "{error}");
        let missing = load_linear(folder.path().join("none"));
        assert!(matches!(missing, Err(Error::MissingFile { .. })));
    }
}
