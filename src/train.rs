//! Training small decoder transformers in MX formats: llm.c's shape, explicit kernels forward and backward.
//!
//! | For | see |
//! |---|---|
//! | formats of each operand of each product | [`recipe`] |
//! | a linear layer's three products | [`linear`] |
//! | the transformer, forward and backward | [`model`] |
//! | a step, evaluation, what a checkpoint holds | [`trainer`] |
//! | bytes of text, in order and held out | [`data`] |
//! | blocks for a recipe, from a model's tensors | [`tune`] |
//! | files that survive a kill | [`checkpoint`] |

#[cfg(feature = "safetensors")]
pub mod checkpoint;
pub mod data;
pub mod linear;
pub mod model;
pub mod recipe;
#[cfg(feature = "safetensors")]
pub mod trainer;
pub mod tune;
