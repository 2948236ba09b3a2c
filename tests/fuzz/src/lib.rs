//! What the fuzz targets share. `run.sh` builds and runs them; `cargo fuzz` works, too, with `--fuzz-dir tests/fuzz`.

pub mod config;
pub mod elf;
/// The host's own mock engine and scripted plugin.
#[path = "../../../host-shim/host/tests/common/mod.rs"]
pub mod mock;
pub mod rows;
