//! The one error type.

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. No function of the crate panics on data that a caller hands in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A format that does not exist.
    #[error("invalid format: {0}")]
    InvalidSpec(String),
    /// Shapes, formats or lengths that do not fit together.
    #[error("{operation}: {problem}")]
    Mismatch {
        /// What was asked for.
        operation: &'static str,
        /// What does not fit, with both sides.
        problem: String,
    },
    /// The engine lacks something that was asked for by name.
    #[error("{operation} needs {needs}, but {has}")]
    Unsupported {
        /// What was asked for.
        operation: String,
        /// What it needs.
        needs: String,
        /// What the engine has instead.
        has: String,
    },
    /// No adapter answers to the name asked for.
    #[error("no adapter matches {wanted:?}; available: {available}. `--example info` lists them")]
    NoAdapter {
        /// The name asked for.
        wanted: String,
        /// The adapters that are there.
        available: String,
    },
    /// A tensor that cannot be split into bindings of the size that the device allows.
    #[error(
        "{what} of {bytes} bytes is larger than the {limit} bytes that the device binds at once"
    )]
    TooLarge {
        /// What was to be allocated: it cannot be split further.
        what: String,
        /// Its size.
        bytes: u64,
        /// The device's limit.
        limit: u64,
    },
    /// The device has no memory left for an allocation.
    #[error(
        "out of device memory while allocating {bytes} bytes for {what}; use smaller tensors, or the CPU engine"
    )]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Its size.
        bytes: u64,
    },
    /// The device is gone: driver reset, unplugged, destroyed. The `Context` must be opened anew.
    #[error("the device was lost: {0}; open a new Context")]
    DeviceLost(String),
    /// The graphics API refused something; a bug in this crate or in a driver.
    #[error("the graphics API reports: {0}")]
    Gpu(String),
    /// A training recipe that says what does not exist, or what contradicts itself.
    #[error("recipe: {0}")]
    Recipe(String),
    /// A training run that cannot go on.
    #[error(
        "step {step}: {what}; the last checkpoint is kept. A lower learning rate, or a milder recipe, may help"
    )]
    Diverged {
        /// The step after which it was seen.
        step: u64,
        /// What is not finite.
        what: String,
    },
    /// A file or buffer whose contents contradict themselves.
    #[error("invalid data: {0}")]
    InvalidData(String),
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// What becomes of a system's error about `path`.
    pub(crate) fn at(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }
}
