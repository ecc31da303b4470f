//! A file that a program writes.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::Result;

/// A file that appears under its name when it is whole. Until then it is a temporary one beside it, which is removed if
/// anything fails.
pub struct OutputFile {
    path: PathBuf,
    /// `path`, or what it is a link to.
    target: PathBuf,
    file: tempfile::NamedTempFile,
}

impl OutputFile {
    /// Makes the temporary file, whose name begins with that of `program`.
    pub fn create(path: &Path, program: &str) -> Result<OutputFile> {
        let fail = |problem: String| format!("cannot write {}: {problem}", path.display());
        if path.exists() && !path.is_file() {
            return Err(fail("it exists and is not a regular file".into()).into());
        }
        let target = path.canonicalize().unwrap_or_else(|_| path.into());
        let directory = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let prefix = format!(".{program}-");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        // Temporary files are private by default; this one becomes an ordinary file, whose mode is the umask's affair.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(directory).map_err(|error| {
            fail(format!("{error}; choose a directory that exists and can be written"))
        })?;
        Ok(OutputFile { path: path.into(), target, file })
    }

    /// Writes the contents through `write`, down to the disk.
    pub fn write(&mut self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, self.file.as_file_mut());
        write(&mut out)
            .and_then(|()| out.flush())
            .and_then(|()| out.get_ref().sync_all())
            .map_err(|error| format!("cannot write {}: {error}", self.path.display()).into())
    }

    /// Gives the file its name; returns what to tell of it.
    pub fn finish(self) -> Result<String> {
        let shown = self.path.display();
        self.file
            .persist(&self.target)
            .map_err(|error| format!("cannot write {shown}: {}", error.error))?;
        Ok(format!("wrote {shown}"))
    }
}
