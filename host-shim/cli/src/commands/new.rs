//! `kvhook new`: a plugin's project.

use std::io::{self, Write};
use std::path::Path;

use crate::args::{Language, New};
use crate::error::CliError;
use crate::project;

/// Writes the project into the current folder, and prints how to go on.
///
/// # Errors
/// [`CliError::ProjectExists`], [`CliError::Write`].
pub fn execute(options: &New) -> Result<(), CliError> {
    let name = &options.name;
    project::write(Path::new(""), name, options.lang, options.kind)?;
    let (source, build, folder) = match options.lang {
        Language::Rust => ("src/lib.rs".to_owned(), "cargo test && cargo build --release", "target/release"),
        Language::C => (format!("{}.c", name.as_str()), "make test", "."),
    };
    let text = format!(
        "{name}/ is written; the method is in {source}. Next:\n  \
         cd {name} && {build}\n  \
         kvhook run --plugin {folder}/libkvhook_{}.so --prompt-file prompt.txt -v\n",
        name.identifier(),
        name = name.as_str(),
    );
    io::stdout().write_all(text.as_bytes()).map_err(|source| CliError::Write { path: "standard output".into(), source })
}
