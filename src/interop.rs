//! Files of other projects.

#[cfg(feature = "safetensors")]
pub mod safetensors;
