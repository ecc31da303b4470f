//! A file that a program reads.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

use crate::Result;

/// Maps a regular file that is not empty.
pub fn map(path: &Path) -> Result<Mmap> {
    let fail = |error: io::Error| format!("cannot read {}: {error}", path.display());
    let file = File::open(path).map_err(fail)?;
    let about = file.metadata().map_err(fail)?;
    if !about.is_file() {
        return Err(format!("cannot read {}: not a regular file", path.display()).into());
    }
    if about.len() == 0 {
        return Err(format!("{}: the file is empty", path.display()).into());
    }
    // SAFETY: the map is only read. Another program that cuts the file short meanwhile would end this one with a
    // signal, as with every mapped file.
    Ok(unsafe { Mmap::map(&file) }.map_err(fail)?)
}
