//! `kvhook demo`: one passage, the plugins that ship with kvhook, one table.

use std::io;

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

/// Paged, so that the arms share one prefill of the passage.
const CACHE: CacheOptions = CacheOptions { cache: CacheKind::Paged, ranks: 1, dtype: CacheDtype::F16 };

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
    let plan = Plan { texts: &texts, arms: &ARMS.map(arm), prefix: 1024, continuation: 256, passages: 1, cache: CACHE };
    let comparison = measure::compare(&loaded, &plan)?;
    report::deliver(&comparison, &options.output, &mut io::stdout().lock())
}
