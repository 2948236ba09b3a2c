//! Passages of texts: a prompt and the tokens behind it, which are scored.

use std::path::{Path, PathBuf};

use kvhook_engine::model::Tokenizer;

use crate::error::{Error, Result};

/// A text as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// Name of its file without `.txt`.
    pub name: String,
    /// All of it.
    pub content: String,
    /// The same as tokens.
    pub tokens: Vec<u32>,
}

/// All `.txt` files of a folder, in the order of their names.
///
/// # Errors
/// [`Error::File`], and the tokenizer's.
pub fn texts(folder: &Path, tokenizer: &Tokenizer) -> Result<Vec<Text>> {
    let listed = std::fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let listed = listed.map_err(|source| Error::File { path: folder.into(), source })?;
    let mut paths: Vec<_> = listed.into_iter().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort_unstable();
    let text = |path: PathBuf| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let content = std::fs::read_to_string(&path).map_err(|source| Error::File { path, source })?;
        let tokens = tokenizer.encode(&content)?;
        Ok(Text { name, content, tokens })
    };
    paths.into_iter().map(text).collect()
}

/// First tokens of `wanted` passages, spread evenly over `tokens` tokens, and whether whole passages are disjoint; the
/// `scored` last tokens of each always are. None where they do not fit.
pub fn spread(tokens: usize, prompt: usize, scored: usize, wanted: usize) -> Option<(Vec<usize>, bool)> {
    let room = tokens.checked_sub(prompt + scored)?;
    let step = match wanted {
        0 | 1 => tokens,
        _ => room / (wanted - 1),
    };
    (step >= scored).then(|| ((0..wanted).map(|index| index * step).collect(), step >= prompt + scored))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scored_tokens_never_overlap() {
        assert_eq!(spread(100, 20, 10, 3), Some((vec![0, 35, 70], true)));
        assert_eq!(spread(100, 20, 10, 4), Some((vec![0, 23, 46, 69], false)));
        assert_eq!(spread(100, 20, 10, 8), Some((vec![0, 10, 20, 30, 40, 50, 60, 70], false)));
        assert_eq!(spread(100, 20, 10, 9), None);
        assert_eq!(spread(30, 20, 10, 1), Some((vec![0], true)));
        assert_eq!(spread(29, 20, 10, 1), None);
    }
}
