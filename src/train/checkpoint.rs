//! The state of a run in a .safetensors file, which a kill, a full disk or a power cut at any instant leaves whole.
//!
//! A [`Checkpoint`] is named tensors and a map of strings. Its file is an ordinary .safetensors file with one more entry
//! of metadata, `microscaling.checkpoint = 1`, the version of this scheme.
//!
//! It is written beside its place (`NAME.tmp`), flushed to the disk and renamed. [`Checkpoint::save_latest`] keeps two of
//! them in a directory: the last one becomes `previous.safetensors`, then the new one `latest.safetensors`. Between the
//! two renames there is only the former, and [`Checkpoint::load_latest`] takes it. One process writes to a directory.
//!
//! **Exact**: what is loaded is what was saved; the same state gives the same file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use crate::interop::safetensors::{Dtype, Stored};

use crate::interop::safetensors::TensorFile;
use crate::{Error, Result};

/// The metadata key of the scheme's version.
pub const VERSION_KEY: &str = "microscaling.checkpoint";
/// The version that this crate writes and reads.
pub const VERSION: &str = "1";
/// The file of the last checkpoint.
pub const LATEST: &str = "latest.safetensors";
/// The file of the one before.
pub const PREVIOUS: &str = "previous.safetensors";

/// Named tensors and strings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    /// Everything that is no tensor: the step, the model, the recipe, the text's fingerprint.
    pub meta: BTreeMap<String, String>,
    /// The tensors.
    pub tensors: BTreeMap<String, Stored<'static>>,
}

/// What [`Checkpoint::load_latest`] found.
#[derive(Debug)]
pub struct Found {
    /// The state.
    pub checkpoint: Checkpoint,
    /// Its file.
    pub path: PathBuf,
    /// Why it is not the latest one, where that is there and cannot be read.
    pub passed_over: Option<Error>,
}

impl Checkpoint {
    /// Adds a tensor of little-endian bytes. A name that is taken, or bytes that are not those of the shape, are an
    /// error.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Result<()> {
        let name = name.into();
        let mismatch = |problem| Error::Mismatch { operation: "Checkpoint::insert", problem };
        let bits = shape.iter().try_fold(dtype.bitsize(), |bits, n| bits.checked_mul(*n));
        if bits != bytes.len().checked_mul(8) {
            let len = bytes.len();
            return Err(mismatch(format!("tensor {name:?}: {len} bytes for {dtype} {shape:?}")));
        }
        if self.tensors.contains_key(&name) {
            return Err(mismatch(format!("tensor {name:?} is there already")));
        }
        self.tensors.insert(name, Stored { dtype, shape: shape.to_vec(), data: bytes.into() });
        Ok(())
    }

    /// Takes the bytes of a tensor out. One that is missing, or of another type or shape, is an error.
    pub fn take(&mut self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Vec<u8>> {
        let Some(stored) = self.tensors.get(name) else {
            return Err(invalid(format_args!("the checkpoint has no tensor {name:?}")));
        };
        if (stored.dtype, &stored.shape[..]) != (dtype, shape) {
            return Err(invalid(format_args!(
                "tensor {name:?} of the checkpoint is {} {:?}, but here it is {dtype} {shape:?}",
                stored.dtype, stored.shape
            )));
        }
        Ok(self.tensors.remove(name).map_or_else(Vec::new, |stored| stored.data.into_owned()))
    }

    /// An entry of the metadata, parsed.
    pub fn value<T: FromStr>(&self, key: &str) -> Result<T> {
        let Some(text) = self.meta.get(key) else {
            return Err(invalid(format_args!("the checkpoint has no metadata {key:?}")));
        };
        text.parse().map_err(|_| {
            invalid(format_args!(
                "metadata {key:?} of the checkpoint is {text:?}, not such a value"
            ))
        })
    }

    /// Writes a file, in one step as seen from outside. On an error the file that was there stays.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.write_beside(path)?.rename_to(path)?;
        sync_parent(path)
    }

    /// Makes this the latest checkpoint of a directory, which is made if it is missing, and keeps the one before. On an
    /// error at least one of those that were there stays.
    pub fn save_latest(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory).map_err(Error::at(directory))?;
        let latest = directory.join(LATEST);
        let written = self.write_beside(&latest)?;
        match fs::rename(&latest, directory.join(PREVIOUS)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::at(&latest)(error)),
            _ => Ok(()),
        }?;
        written.rename_to(&latest)?;
        sync_parent(&latest)
    }

    /// Reads a file. One that is cut short, is no checkpoint, or is of another version is an error.
    pub fn load(path: &Path) -> Result<Checkpoint> {
        let bytes = fs::read(path).map_err(Error::at(path))?;
        let wrong = |problem: &dyn std::fmt::Display| {
            invalid(format_args!("checkpoint {}: {problem}", path.display()))
        };
        let file = TensorFile::parse(&bytes).map_err(|error| match error {
            Error::InvalidData(problem) => {
                wrong(&format_args!("cut short, damaged, or no .safetensors file: {problem}"))
            }
            other => other,
        })?;
        let mut meta = file.metadata;
        match meta.remove(VERSION_KEY).as_deref() {
            Some(VERSION) => {}
            None => {
                return Err(wrong(&format_args!(
                    "a .safetensors file, but no checkpoint: its metadata lacks {VERSION_KEY}"
                )));
            }
            Some(found) => {
                return Err(wrong(&format_args!(
                    "of version {found:?}, and this crate reads {VERSION:?}; use the version of the crate that wrote it"
                )));
            }
        }
        let owned = |(name, stored): (String, Stored<'_>)| {
            let data = stored.data.into_owned().into();
            (name, Stored { dtype: stored.dtype, shape: stored.shape, data })
        };
        Ok(Checkpoint { meta, tensors: file.tensors.into_iter().map(owned).collect() })
    }

    /// Reads the latest checkpoint of a directory that can be read; `None` where there is none at all.
    pub fn load_latest(directory: &Path) -> Result<Option<Found>> {
        let mut passed_over = None;
        for name in [LATEST, PREVIOUS] {
            let path = directory.join(name);
            match Checkpoint::load(&path) {
                Ok(checkpoint) => return Ok(Some(Found { checkpoint, path, passed_over })),
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    passed_over.get_or_insert(error);
                }
            }
        }
        passed_over.map_or(Ok(None), Err)
    }

    /// Writes the temporary file of `path`, down to the disk.
    fn write_beside(&self, path: &Path) -> Result<Temporary> {
        fn borrowed<'a>((name, s): (&String, &'a Stored<'static>)) -> (String, Stored<'a>) {
            let data = (&s.data[..]).into();
            (name.clone(), Stored { dtype: s.dtype, shape: s.shape.clone(), data })
        }
        let mut metadata = self.meta.clone();
        metadata.insert(VERSION_KEY.into(), VERSION.into());
        let tensors: BTreeMap<String, Stored<'_>> = self.tensors.iter().map(borrowed).collect();
        let contents = TensorFile { tensors, metadata };
        let mut name = path.as_os_str().to_os_string();
        name.push(".tmp");
        let path = PathBuf::from(name);
        let file = File::create(&path).map_err(Error::at(&path))?;
        let temporary = Temporary { path };
        let mut out = BufWriter::with_capacity(1 << 20, file);
        contents
            .write_to(&mut out)
            .and_then(|()| out.flush())
            .and_then(|()| out.get_ref().sync_all())
            .map_err(Error::at(&temporary.path))?;
        Ok(temporary)
    }
}

/// A file that is removed unless it gets its name.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn rename_to(mut self, path: &Path) -> Result<()> {
        fs::rename(&self.path, path).map_err(Error::at(path))?;
        self.path.clear();
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // The error that led here is the one to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Renames reach the disk with their directory. Only Unix lets one be flushed.
fn sync_parent(path: &Path) -> Result<()> {
    if cfg!(unix) {
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        File::open(directory).and_then(|file| file.sync_all()).map_err(Error::at(directory))?;
    }
    Ok(())
}

fn invalid(problem: std::fmt::Arguments<'_>) -> Error {
    Error::InvalidData(problem.to_string())
}
