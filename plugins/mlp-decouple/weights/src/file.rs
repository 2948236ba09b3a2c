//! Files on disk: mapped to be read, and replaced whole when written.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::WeightsError;

/// A file that is read where it lies.
#[derive(Debug)]
pub struct Mapped(Option<Mmap>);

impl Mapped {
    /// Maps a file. It must not be cut while it is mapped: replace weight files, do not write into them.
    ///
    /// # Errors
    /// [`WeightsError::Read`].
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let failed = |source| WeightsError::Read { path: path.into(), source };
        // Asked before it is opened: opening a pipe waits for its writer.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(failed(std::io::Error::other("it is not a plain file")));
        }
        let file = File::open(path).map_err(failed)?;
        // No platform maps a file of no bytes.
        if file.metadata().map_err(failed)?.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the map is private and read only. Bytes that another process changes meanwhile are only decoded as
        // numbers or compared, and every length is checked against the map's own; that nobody cuts the file is asked of
        // the caller above.
        let map = unsafe { Mmap::map(&file) };
        map.map(|map| Self(Some(map))).map_err(failed)
    }

    /// Its content.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

/// Writes a file beside its place and then moves it there, so that one that is mapped stays whole.
///
/// # Errors
/// [`WeightsError::Write`].
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    let failed = |source| WeightsError::Write { path: path.into(), source };
    let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(format!(".{}.part", std::process::id()));
    let beside = path.with_file_name(name);
    std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path)).map_err(|source| {
        // What is left over is of no use, and the first error is the one to tell.
        let _ = std::fs::remove_file(&beside);
        failed(source)
    })
}
