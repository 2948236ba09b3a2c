//! A new plugin's project: everything that it takes to build, test and load it, without any engine and without a checkout of
//! kvhook.

mod name;
mod templates;

use std::io;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use tar::Archive;

pub use name::{NameError, PluginName};

use crate::args::{Kind, Language};
use crate::error::CliError;

/// The crates that a plugin in Rust is built with, below `vendor/`.
static RUST_FILES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/rust.tar.gz"));
/// The header that a plugin in C is built with, below `include/`, its helpers, and the mock engine of its test.
static C_FILES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/c.tar.gz"));

/// Writes the project into a new folder of `parent`, named as the plugin, and gives its path.
///
/// # Errors
/// [`CliError::ProjectExists`] when something of that name is there, which stays as it is; [`CliError::Write`], and then
/// nothing is left behind.
pub fn write(parent: &Path, name: &PluginName, language: Language, kind: Kind) -> Result<PathBuf, CliError> {
    let folder = parent.join(name.as_str());
    // Made and not looked for: whoever is faster has the name.
    std::fs::create_dir(&folder).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => CliError::ProjectExists { path: folder.clone() },
        _ => CliError::Write { path: folder.clone(), source },
    })?;
    fill(&folder, name, language, kind).inspect_err(|_| {
        // The first error is the one to be told.
        let _ = std::fs::remove_dir_all(&folder);
    })?;
    Ok(folder)
}

/// Writes all files of a project.
fn fill(folder: &Path, name: &PluginName, language: Language, kind: Kind) -> Result<(), CliError> {
    let packed = match language {
        Language::Rust => RUST_FILES,
        Language::C => C_FILES,
    };
    let mut archive = Archive::new(GzDecoder::new(packed));
    archive.set_preserve_mtime(false);
    archive.unpack(folder).map_err(|source| CliError::Write { path: folder.into(), source })?;
    for (path, text) in templates::of(language, kind) {
        let path = folder.join(name.insert(path));
        let write = || {
            path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            std::fs::write(&path, name.insert(text))
        };
        write().map_err(|source| CliError::Write { path: path.clone(), source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> PluginName {
        name.parse().unwrap()
    }

    /// All files below `folder`, as paths relative to it.
    fn files(folder: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![folder.to_path_buf()];
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    found.push(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        found
    }

    #[test]
    fn no_placeholder_and_no_code_for_devices_is_left() {
        let parent = tempfile::tempdir().unwrap();
        for (plugin, language, kind) in [
            ("one", Language::Rust, Kind::Scorer),
            ("two-b", Language::Rust, Kind::Rewriter),
            ("three", Language::C, Kind::Scorer),
            ("four_d", Language::C, Kind::Rewriter),
        ] {
            let folder = write(parent.path(), &name(plugin), language, kind).unwrap();
            assert_eq!(folder, parent.path().join(plugin));
            let files = files(&folder);
            assert!(files.len() > 6, "{files:?}");
            for file in files {
                let bytes = std::fs::read(folder.join(&file)).unwrap();
                let text = String::from_utf8_lossy(&bytes);
                assert!(!file.contains("cuda") && !file.contains("plugin-name"), "{file}");
                assert!(!text.contains("plugin-name") && !text.contains("plugin_name"), "{file}");
                assert!(!text.contains("mod cuda;"), "{file}");
            }
        }
    }

    #[test]
    fn what_is_there_stays() {
        let parent = tempfile::tempdir().unwrap();
        let there = parent.path().join("mine");
        std::fs::write(&there, "a file").unwrap();
        let write = |parent: &Path| write(parent, &name("mine"), Language::Rust, Kind::Scorer);
        assert!(matches!(write(parent.path()), Err(CliError::ProjectExists { path }) if path == there));
        assert_eq!(std::fs::read_to_string(&there).unwrap(), "a file");
        std::fs::remove_file(&there).unwrap();
        std::fs::create_dir(&there).unwrap();
        assert!(matches!(write(parent.path()), Err(CliError::ProjectExists { .. })));
        assert!(std::fs::read_dir(&there).unwrap().next().is_none(), "an empty folder is somebody's, too");
        assert!(matches!(write(&parent.path().join("no-such")), Err(CliError::Write { .. })));
    }

    /// The copies' manifests name what the crates' own do.
    #[test]
    fn the_copies_have_the_versions_of_the_workspace() {
        let read = |path: &str| -> toml::Table {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
            std::fs::read_to_string(path).unwrap().parse().unwrap()
        };
        let workspace = &read("../../Cargo.toml")["workspace"];
        for (own, copy) in
            [("hook-abi", "kvhook-abi"), ("kernels", "kvhook-kernels"), ("hook-abi/testing", "kvhook-testing")]
        {
            let (own, copy) =
                (read(&format!("../../{own}/Cargo.toml")), read(&format!("templates/rust/vendor/{copy}.toml")));
            for key in ["version", "edition", "rust-version", "license"] {
                assert_eq!(copy["package"][key], workspace["package"][key], "{key}");
            }
            let dependencies = own["dependencies"].as_table().unwrap();
            for (name, dependency) in copy["dependencies"].as_table().unwrap() {
                assert!(dependencies.contains_key(name), "{name} is not a dependency any more");
                let inherited = &workspace["dependencies"][name];
                let version = |value: &toml::Value| value.get("version").unwrap_or(value).clone();
                if name.starts_with("kvhook-") {
                    continue;
                }
                assert_eq!(version(dependency), version(inherited), "{name}");
                assert_eq!(dependency.get("default-features"), inherited.get("default-features"), "{name}");
                assert_eq!(
                    features(dependency),
                    [features(inherited), features(&dependencies[name])].concat(),
                    "{name}"
                );
            }
            // What the copies lack is what is behind features that they lack.
            for (name, dependency) in dependencies.iter().filter(|(name, _)| copy["dependencies"].get(*name).is_none())
            {
                assert_eq!(dependency.get("optional"), Some(&toml::Value::Boolean(true)), "{name} is missing");
            }
        }
    }

    fn features(dependency: &toml::Value) -> Vec<String> {
        let features = dependency.get("features").and_then(toml::Value::as_array);
        features.into_iter().flatten().map(|feature| feature.as_str().unwrap().to_owned()).collect()
    }
}
