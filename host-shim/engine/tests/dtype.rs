//! Caches of 16 bits against the f32 cache.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{CONTIGUOUS, novel, paged, runner};
use kvhook_engine::quality::mean_kl;
use kvhook_engine::{CacheConfig, KvDtype, Scoring};

/// Mean divergence from the f32 cache over 64 tokens behind 300.
///
/// Rounding a row to a type with `b` bits of mantissa changes each channel by at most `2^-(b+1)` of itself. A logit's
/// change is linear in that, and a divergence is quadratic, so bf16 (7 bits) may diverge 64 times as much as f16
/// (10 bits). Measured: f16 4.2e-7, bf16 2.6e-5; the bounds
/// are about four times that.
#[test]
fn diverge_within_their_rounding() {
    let tokens = novel(12_000, 364);
    let rows = |config| {
        let mut runner = runner(config);
        let (id, _) = runner.prefill(&tokens[..300], 512).unwrap();
        (runner.score(id, &tokens[300..], Scoring::Together).unwrap(), runner.cache_bytes().unwrap())
    };
    let (full, full_bytes) = rows(CONTIGUOUS);
    for (dtype, bound) in [(KvDtype::F16, 2e-6), (KvDtype::Bf16, 1e-4)] {
        let (contiguous, bytes) = rows(CacheConfig { dtype, ..CONTIGUOUS });
        let (paged, _) = rows(CacheConfig { dtype, ..paged(16, 32) });
        let kl = mean_kl(&full, &contiguous);
        println!("{dtype:?}: {kl:.2e}");
        assert!(kl > 0.0 && kl < bound, "{dtype:?} diverges by {kl}");
        assert_eq!(contiguous, paged);
        assert_eq!(2 * bytes, full_bytes);
    }
}
