//! What is generated from the code and checked in: the C headers and the ABI table.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub mod contract;
pub mod header;
pub mod table;

/// Why generating or comparing failed.
#[derive(Debug, thiserror::Error)]
pub enum CodegenError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The header's generator refuses a config or a source.
    #[error("{path}: {problem}")]
    Header {
        /// The config or source.
        path: PathBuf,
        /// What it says.
        problem: String,
    },
    /// The ABI table cannot be read.
    #[error("{path}: {source}")]
    Table {
        /// The table.
        path: PathBuf,
        /// Where it is broken.
        source: Box<toml::de::Error>,
    },
    /// A released row of the ABI table differs from the code.
    #[error(
        "{name} generation {generation} is released and must never change, but {problem}; \
         add a generation or an id instead"
    )]
    ReleasedChanged {
        /// The struct.
        name: String,
        /// Its generation.
        generation: u32,
        /// How it differs.
        problem: String,
    },
    /// A checked-in file is not what the code gives.
    #[error("{path} is not up to date; run `cargo run -p kvhook-codegen`. Differences:\n{difference}")]
    Outdated {
        /// The file.
        path: PathBuf,
        /// Lines that differ.
        difference: String,
    },
}

/// Writes or compares all generated files below `root`, the repository's; gives a line for each.
///
/// # Errors
/// The first file that cannot be generated, or differs when `check` is set.
pub fn run(root: &Path, check: bool) -> Result<Vec<String>, CodegenError> {
    let mut report = Vec::new();
    for header in header::HEADERS {
        if root.join(header.config).exists() {
            report.push(put(&root.join(header.output), &header.generate(root)?, check)?);
        }
    }
    let path = root.join(table::PATH);
    report.push(put(&path, &table::generate(&path)?, check)?);
    Ok(report)
}

fn put(path: &Path, text: &str, check: bool) -> Result<String, CodegenError> {
    let file_error = |source| CodegenError::File { path: path.to_owned(), source };
    let found = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other.map_err(file_error)?,
    };
    if found == text {
        return Ok(format!("{}: up to date", path.display()));
    }
    if check {
        return Err(CodegenError::Outdated { path: path.to_owned(), difference: difference(&found, text) });
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(file_error)?;
    }
    fs::write(path, text).map_err(file_error)?;
    Ok(format!("{}: written", path.display()))
}

/// The lines between the common beginning and the common end of two texts, `-` found and `+` expected.
fn difference(found: &str, expected: &str) -> String {
    let (found, expected): (Vec<_>, Vec<_>) = (found.lines().collect(), expected.lines().collect());
    let same = found.iter().zip(&expected).take_while(|(a, b)| a == b).count();
    let rest = found.len().min(expected.len()) - same;
    let tail = found.iter().rev().zip(expected.iter().rev()).take(rest).take_while(|(a, b)| a == b).count();
    let lines = |sign: char, lines: &[&str]| {
        lines[same..lines.len() - tail].iter().take(40).map(|line| format!("{sign}{line}\n")).collect::<String>()
    };
    format!("@@ line {} @@\n{}{}", same + 1, lines('-', &found), lines('+', &expected))
}

#[cfg(test)]
mod tests {
    use super::difference;

    #[test]
    fn a_difference_shows_the_changed_lines_only() {
        assert_eq!(difference("a\nb\nc\n", "a\nx\ny\nc\n"), "@@ line 2 @@\n-b\n+x\n+y\n");
        assert_eq!(difference("a\n", "a\nb\n"), "@@ line 2 @@\n+b\n");
    }
}
