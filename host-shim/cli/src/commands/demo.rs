//! `kvhook demo`: one passage, the plugins that ship with kvhook, one table.

use std::io;
use std::path::{Path, PathBuf};

use kvhook_engine::Device;
use kvhook_host::load::Policy;

use crate::args::{CacheDtype, CacheKind, CacheOptions, Demo};
use crate::arm::ArmSpec;
use crate::error::CliError;
use crate::measure::{self, Plan, Text};
use crate::{model, report};

/// Speeches in the public domain; the passage is in the middle of them.
const TEXT: &str = include_str!("../../../../tests/text/state-of-the-union.txt");

/// Name, plugin and config of each arm.
const ARMS: [(&str, &str, &str); 8] = [
    ("noop", "noop", ""),
    ("recent-50", "truncate", "keep=0.5"),
    ("recent-25", "truncate", "keep=0.25"),
    ("sample-50", "truncate", "keep=0.5,history=sample,importance=uniform"),
    ("keydiff-50", "truncate", "keep=0.5,history=top,importance=key_diff"),
    ("keydiff-25", "truncate", "keep=0.25,history=top,importance=key_diff"),
    ("attention-25", "truncate", "keep=0.25,history=top,importance=attention"),
    (
        "layers-100-25",
        "truncate",
        r#"{"history": "top", "importance": "attention", "layers": {"0-3": 1.0, "4-": 0.25}}"#,
    ),
];

/// Name and weight file of each arm of `mlp-decouple`, trained for the default model.
const TRAINED: [(&str, &str); 2] =
    [("mlp-f2", "smollm2-135m-f2.safetensors"), ("mlp-f4", "smollm2-135m-f4.safetensors")];

/// Paged, so that the arms share one prefill of the passage.
fn cache(device: Device) -> CacheOptions {
    CacheOptions { cache: CacheKind::Paged, ranks: 1, dtype: CacheDtype::F16, device }
}

/// The arms of `mlp-decouple` whose weights are there: in a folder `mlp-decouple` beside the plugins, or in the source
/// tree that this program was built from.
fn trained() -> Vec<ArmSpec> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/mlp-decouple/trained");
    let beside = Policy::new(Vec::new(), None).folders.into_iter().map(|folder| folder.join("mlp-decouple"));
    let folders: Vec<PathBuf> = beside.chain([source]).collect();
    let arm = |(name, file): (&str, &str)| {
        let path = folders.iter().map(|folder| folder.join(file)).find(|path| path.is_file())?;
        let config = serde_json::json!({ "weights": path.to_str()? }).to_string();
        Some(ArmSpec { name: name.into(), plugin: "mlp-decouple".into(), config })
    };
    TRAINED.into_iter().filter_map(arm).collect()
}

/// Fetches the model when no other is named, measures all arms, and prints what came out.
///
/// # Errors
/// Each of [`CliError`] but those of `inspect`.
pub fn execute(options: &Demo) -> Result<(), CliError> {
    let loaded = model::load_named(options.model.as_deref())?;
    let texts = [Text { name: "state-of-the-union.txt".into(), content: TEXT.into() }];
    let arm = |(name, plugin, config): (&str, &str, &str)| ArmSpec {
        name: name.into(),
        plugin: plugin.into(),
        config: config.into(),
    };
    let mut arms = ARMS.map(arm).to_vec();
    if options.model.is_none() {
        arms.extend(trained());
    }
    let cache = cache(options.device);
    let plan = Plan { texts: &texts, arms: &arms, prefix: 1024, continuation: 256, passages: 1, cache };
    let comparison = measure::compare(&loaded, &plan)?;
    report::deliver(&comparison, &options.output, &mut io::stdout().lock())
}
