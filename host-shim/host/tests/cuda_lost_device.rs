//! A kernel that faults takes the device's context with it. In a program of its own, for that reason.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::plugin::{Script, Style};
use common::{Engine, Placed, SMALL, Shape, gpu};
use kvhook_host::raw::*;

const DONE: i32 = KVHOOK_EVENT_PREFILL_DONE;
const POOL: usize = 1 << 20;

#[test]
fn a_lost_device_is_told_by_the_verdict_and_by_later_calls() {
    if gpu::gpu().is_none() {
        return;
    }
    let script = Arc::new(Script::default());
    let engine = Engine::with(Shape { gpu: true, ..SMALL }, &script);
    let stream = engine.streams[0];
    let mut cache = engine.begin(24);
    let other = engine.begin(24);
    let placed = [Placed::new(&other, 0, false, stream)];
    // What the host gives back on a lost device goes nowhere.
    let pool = gpu::alloc(POOL, stream) as usize;
    *engine.watch.pool.lock().unwrap() = pool..pool + POOL;
    engine.sync();

    // A list that lies nowhere.
    *script.tamper.lock().unwrap() = Some(Box::new(|_, _, layers| layers[0].indices = 0x10000 as *const u32));
    let blocked = gpu::block(stream);
    let ticket = engine.plan(&mut cache, DONE, false).unwrap();
    assert_eq!(engine.verdict_now(ticket).unwrap().0, KVHOOK_VERDICT_PENDING);
    drop(blocked);
    let start = Instant::now();
    let (verdict, reason) = loop {
        let (verdict, reason, ..) = engine.verdict_now(ticket).unwrap();
        if verdict != KVHOOK_VERDICT_PENDING || start.elapsed() > Duration::from_secs(10) {
            break (verdict, reason);
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!((verdict, reason), (KVHOOK_VERDICT_DROPPED, KVHOOK_REASON_DEVICE));
    let logged = engine.watch.log.lock().unwrap().iter().any(|(_, text)| text.contains("CUDA_ERROR_ILLEGAL_ADDRESS"));
    assert!(logged, "{:?}", engine.watch.log.lock().unwrap());

    // A plan that the plugin makes without the device.
    *script.tamper.lock().unwrap() = None;
    *script.style.lock().unwrap() = Style::Ranges;
    let prepared = engine.prepare_placed(0, &[&other], &placed, DONE, (false, 0), stream).unwrap();
    assert_eq!(prepared, [(0, KVHOOK_REASON_DEVICE)]);
    assert_eq!(engine.fallbacks(KVHOOK_REASON_DEVICE), 2);
    // Nothing there can be given back any more.
    core::mem::forget((engine, placed));
}
