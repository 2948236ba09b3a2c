//! The files of a project that are written for it: paths in it, and texts. In both, `plugin-name` and `plugin_name` stand
//! for the name.

use crate::args::{Kind, Language};

/// A path in the project, and the file's text.
type Template = (&'static str, &'static str);

macro_rules! template {
    ($path:literal) => {
        include_str!(concat!("../../templates/", $path))
    };
}

/// The files for one language and kind.
pub fn of(language: Language, kind: Kind) -> impl Iterator<Item = Template> {
    let (common, own): (&[Template], &[Template]) = match (language, kind) {
        (Language::Rust, Kind::Scorer) => (&RUST, &RUST_SCORER),
        (Language::Rust, Kind::Rewriter) => (&RUST, &RUST_REWRITER),
        (Language::C, Kind::Scorer) => (&C, &C_SCORER),
        (Language::C, Kind::Rewriter) => (&C, &C_REWRITER),
    };
    common.iter().chain(own).copied()
}

const RUST: [Template; 10] = [
    ("Cargo.toml", template!("rust/Cargo.toml")),
    ("README.md", template!("rust/README.md")),
    ("build.rs", template!("rust/build.rs")),
    (".gitignore", template!("rust/gitignore")),
    (".rustfmt.toml", template!("rust/rustfmt.toml")),
    (".github/workflows/ci.yml", template!("rust/ci.yml")),
    ("tests/conformance.rs", template!("rust/tests/conformance.rs")),
    ("vendor/kvhook-abi/Cargo.toml", template!("rust/vendor/kvhook-abi.toml")),
    ("vendor/kvhook-kernels/Cargo.toml", template!("rust/vendor/kvhook-kernels.toml")),
    ("vendor/kvhook-testing/Cargo.toml", template!("rust/vendor/kvhook-testing.toml")),
];

const RUST_SCORER: [Template; 2] =
    [("src/lib.rs", template!("rust/scorer/lib.rs")), ("tests/plugin.rs", template!("rust/scorer/plugin.rs"))];

const RUST_REWRITER: [Template; 2] =
    [("src/lib.rs", template!("rust/rewriter/lib.rs")), ("tests/plugin.rs", template!("rust/rewriter/plugin.rs"))];

const C: [Template; 4] = [
    ("Makefile", template!("c/Makefile")),
    ("README.md", template!("c/README.md")),
    (".gitignore", template!("c/gitignore")),
    (".github/workflows/ci.yml", template!("c/ci.yml")),
];

const C_SCORER: [Template; 2] = [("plugin-name.c", template!("c/scorer.c")), ("test.c", template!("c/scorer_test.c"))];

const C_REWRITER: [Template; 2] =
    [("plugin-name.c", template!("c/rewriter.c")), ("test.c", template!("c/rewriter_test.c"))];
