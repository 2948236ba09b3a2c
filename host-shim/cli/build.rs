//! Packs what `kvhook new` puts into a project beside its templates: for a plugin in Rust the crates that it is built with,
//! for one in C the headers. So the program needs no checkout.

use std::io::{Error, Result, Write};
use std::path::{Path, PathBuf};
use std::{env, fs};

use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{Builder, Header};

/// What the copies do not have: the module of this name, behind the feature of this name, in the crates that have it.
const LEFT_OUT: &str = "cuda";
const LEFT_OUT_DECLARATION: &str = "#[cfg(feature = \"cuda\")]\npub mod cuda;\n";

const LICENCES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-MIT"];

fn main() -> Result<()> {
    let variable = |name: &str| env::var_os(name).map(PathBuf::from).ok_or_else(|| Error::other(format!("no {name}")));
    let repository = variable("CARGO_MANIFEST_DIR")?.join("../..");
    let out = variable("OUT_DIR")?;

    let mut rust = Pack::new(&repository);
    let crates = [("hook-abi", "kvhook-abi"), ("kernels", "kvhook-kernels"), ("hook-abi/testing", "kvhook-testing")];
    for (folder, name) in crates {
        rust.add_sources(&format!("{folder}/src"), &format!("vendor/{name}/src"))?;
        for licence in LICENCES {
            rust.add(licence, &format!("vendor/{name}/{licence}"))?;
        }
    }
    for file in ["build.rs", "examples/value_norm.rs"] {
        rust.add(&format!("hook-abi/{file}"), &format!("vendor/kvhook-abi/{file}"))?;
    }
    for file in ["captured/SOURCE.md", "captured/smollm2-135m.safetensors"] {
        rust.add(&format!("hook-abi/testing/{file}"), &format!("vendor/kvhook-testing/{file}"))?;
    }
    rust.finish(&out.join("rust.tar.gz"))?;

    let mut c = Pack::new(&repository);
    c.add("hook-abi/include/kvhook.h", "include/kvhook.h")?;
    for header in ["helpers.h", "mock.h"] {
        c.add(&format!("hook-abi/c/{header}"), header)?;
    }
    for licence in LICENCES {
        c.add(licence, &format!("include/{licence}"))?;
    }
    c.finish(&out.join("c.tar.gz"))
}

/// An archive in the making. The same files give the same bytes.
struct Pack<'a> {
    repository: &'a Path,
    archive: Builder<GzEncoder<Vec<u8>>>,
}

impl<'a> Pack<'a> {
    fn new(repository: &'a Path) -> Self {
        Self { repository, archive: Builder::new(GzEncoder::new(Vec::new(), Compression::best())) }
    }

    /// Adds the file `from` of the repository as `to`.
    fn add(&mut self, from: &str, to: &str) -> Result<()> {
        println!("cargo::rerun-if-changed={}", self.repository.join(from).display());
        let bytes = fs::read(self.repository.join(from)).map_err(|error| {
            Error::new(error.kind(), format!("{from}, which `kvhook new` puts into projects: {error}"))
        })?;
        self.append(&bytes, to)
    }

    /// Adds the sources of a crate, but for what is left out.
    fn add_sources(&mut self, from: &str, to: &str) -> Result<()> {
        println!("cargo::rerun-if-changed={}", self.repository.join(from).display());
        let mut names = fs::read_dir(self.repository.join(from))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<String>>>()?;
        names.sort();
        for name in names.iter().filter(|name| *name != LEFT_OUT) {
            let (from, to) = (format!("{from}/{name}"), format!("{to}/{name}"));
            if self.repository.join(&from).is_dir() {
                self.add_sources(&from, &to)?;
            } else if name == "lib.rs" {
                let text = fs::read_to_string(self.repository.join(&from))?;
                if names.iter().any(|name| name == LEFT_OUT) != text.contains(LEFT_OUT_DECLARATION) {
                    return Err(Error::other(format!("{from} does not declare the module `{LEFT_OUT}` as expected")));
                }
                self.append(text.replace(LEFT_OUT_DECLARATION, "").as_bytes(), &to)?;
            } else {
                self.add(&from, &to)?;
            }
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8], to: &str) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        self.archive.append_data(&mut header, to, bytes)
    }

    fn finish(self, path: &Path) -> Result<()> {
        let bytes = self.archive.into_inner()?.finish()?;
        fs::File::create(path)?.write_all(&bytes)
    }
}
