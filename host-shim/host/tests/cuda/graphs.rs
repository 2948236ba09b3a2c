//! Prepare and commit captured into graphs.

use std::sync::Arc;

use kvhook_host::raw::*;

use crate::common::plugin::{Script, Style};
use crate::common::{Engine, F16, Placed, Shape, gpu};
use crate::{DONE, GPU};

/// Memory of the engine's from which it lends while it captures, in bytes.
const POOL: usize = 4 << 20;

#[test]
fn prepare_and_commit_are_captured_and_replayed() {
    let Some(_device) = gpu::alone() else { return };
    for (block_size, style) in [(0, Style::Heads), (4, Style::Heads), (4, Style::Ranges), (4, Style::Rewrite)] {
        // No whole blocks, so that ranges are moved, too.
        let count = |_, length: u64| length / 2 - 1;
        let script = Arc::new(Script { style: style.into(), count: Box::new(count), ..Script::default() });
        let engine = Engine::with(Shape { block_size, dtype: F16, k_dim: 64, v_dim: 8, ..GPU }, &script);
        let stream = engine.streams[0];
        let mut cache = engine.begin(24);
        assert_eq!(engine.ask(&cache, DONE).0, KVHOOK_DECISION_IN_PLACE);
        cache.remember_plan();
        let planned = cache.clone();
        let placed = [Placed::new(&cache, 0, false, stream)];
        let pool = gpu::alloc(POOL, stream);
        gpu::sync(stream);
        *engine.watch.pool.lock().unwrap() = pool as usize..pool as usize + POOL;

        // The verdict is that of a replay: as often as wanted, as long as the ticket is open.
        let (prepare, ticket) = gpu::capture(stream, || {
            let (ticket, reason) = engine.prepare_placed(0, &[&cache], &placed, DONE, (false, 0), stream).unwrap()[0];
            assert_ne!(ticket, 0, "kept: {reason}");
            // Whoever asks spoils no capture.
            assert_eq!(engine.verdict_now(ticket).unwrap().0, KVHOOK_VERDICT_PENDING);
            ticket
        });
        assert_eq!(engine.verdict_now(ticket).unwrap().0, KVHOOK_VERDICT_PENDING, "nothing ran yet");
        for _ in 0..2 {
            prepare.replay(stream);
            assert_eq!(engine.verdict_now(ticket).unwrap().0, KVHOOK_VERDICT_READY);
        }
        placed[0].read_back();
        cache.verify_bytes();

        let (commit, _) =
            gpu::capture(stream, || engine.commit_placed(0, &cache, ticket, &placed[0], None, stream).unwrap());
        placed[0].read_back();
        cache.verify_bytes();
        commit.replay(stream);
        placed[0].read_back();
        cache.expect_all(&script);
        engine.verify(&cache);

        // The same rows again, in memory that the engine has not lent to anybody since: the same bytes again.
        placed[0].write(&planned, 0, stream);
        gpu::sync(stream);
        prepare.replay(stream);
        commit.replay(stream);
        placed[0].read_back();
        engine.verify(&cache);

        drop((prepare, commit, placed));
        drop(engine);
        gpu::release(pool, POOL);
    }
}
