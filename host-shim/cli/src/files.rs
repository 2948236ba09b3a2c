//! Reading inputs and writing results, with errors that say what to do.

use std::path::Path;

use crate::error::CliError;

/// The whole of a UTF-8 text file.
///
/// # Errors
/// [`CliError::Read`], [`CliError::NotUtf8`].
pub fn read_text(path: &Path) -> Result<String, CliError> {
    let bytes = std::fs::read(path).map_err(|source| CliError::Read { path: path.into(), source })?;
    String::from_utf8(bytes).map_err(|e| CliError::NotUtf8 { path: path.into(), at: e.utf8_error().valid_up_to() })
}

/// Writes a result, replacing the file.
///
/// # Errors
/// [`CliError::Write`].
pub fn write_text(path: &Path, text: &str) -> Result<(), CliError> {
    std::fs::write(path, text).map_err(|source| CliError::Write { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_back_and_wrong_bytes_are_located() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        write_text(&path, "häuser").unwrap();
        assert_eq!(read_text(&path).unwrap(), "häuser");
        std::fs::write(&path, b"ok\xff").unwrap();
        assert!(matches!(read_text(&path), Err(CliError::NotUtf8 { at: 2, .. })));
        assert!(matches!(read_text(&folder.path().join("none")), Err(CliError::Read { .. })));
        assert!(matches!(write_text(folder.path(), ""), Err(CliError::Write { .. })));
    }
}
