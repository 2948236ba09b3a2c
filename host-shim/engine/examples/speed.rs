//! Prefill and decode speed of the default model: `cargo run --release -p kvhook-engine --example speed [TOKENS [DEVICE]]`.

use std::sync::Arc;
use std::time::Instant;

use kvhook_engine::model::fetch;
use kvhook_engine::{CacheConfig, CacheKind, Device, KvDtype, Model, Result, Runner, Scoring};

fn main() -> Result<()> {
    let tokens = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(1024);
    let device = std::env::args().nth(2).and_then(|text| text.parse().ok()).unwrap_or(Device::Cpu);
    let start = Instant::now();
    let model = Arc::new(Model::load(&fetch::default_model(|_, _| {})?)?);
    println!("load: {:.2} s", start.elapsed().as_secs_f64());
    let prompt: Vec<u32> = (0..tokens).map(|i: u32| 1000 + i * 7919 % 40_000).collect();
    let paged = CacheKind::Paged { block_size: 16, blocks: 1024 };
    for (name, kind, dtype, ranks) in [
        ("contiguous f32, 1 rank", CacheKind::Contiguous, KvDtype::F32, 1),
        ("paged f16, 1 rank", paged, KvDtype::F16, 1),
        ("paged bf16, 3 ranks", paged, KvDtype::Bf16, 3),
    ] {
        let cache = CacheConfig { kind, dtype, ranks, prefix_sharing: false, device };
        let mut runner = Runner::new(Arc::clone(&model), cache)?;
        // The first step of a device pays for memory that later ones find.
        let (id, _) = runner.prefill(&prompt, 512)?;
        runner.free(id)?;
        let start = Instant::now();
        let (id, _) = runner.prefill(&prompt, 512)?;
        let prefill = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let answer = prompt.len().min(64);
        runner.score(id, &prompt[..answer], Scoring::OneByOne)?;
        let decode = start.elapsed().as_secs_f64() / answer as f64;
        println!(
            "{name}: prefill of {tokens} tokens {prefill:.2} s ({:.0} tokens/s), decode {:.1} ms ({:.1} tokens/s)",
            f64::from(tokens) / prefill,
            decode * 1e3,
            1.0 / decode
        );
    }
    Ok(())
}
