//! What a kernel is, for each operation: a struct of functions with a contract, and the layouts that
//! they read. Leaves (one instruction set each) import these; the table imports the leaves.

pub(crate) mod int8_product;
pub(crate) mod panel_product;
pub(crate) mod rows;
pub(crate) mod softmax;

pub(crate) use int8_product::{
    Geometry, Int8Product, LhsFormat, MAX_TILE, ScoreTile, TileInput, ZeroPair, zero_groups,
};
pub(crate) use panel_product::{
    Format, GROUP, INT16_MATRIX, Int8Run, LANES, Panel, PanelProduct, RUN, Stored, StoredProduct,
    VECTORS, bf16_bits,
};
pub(crate) use rows::{BlockCodes, Condition, ROTATED, RowKernels, RowRanges, Rows, Transpose};
pub(crate) use softmax::{CODES, ExpBf16, F32Exp, Int16Exp, Int16Runs, Scores, Softmax};
