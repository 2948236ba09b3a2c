//! Calls in any order, compared with the plain model after each.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use common::plugin::{Script, Style};
use common::{BF16, Cache, Engine, F32, SMALL, Shape};
use kvhook_abi::raw::*;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Begin(u64),
    Append(usize, u64),
    Plan(usize, i32, bool),
    Commit(usize),
    Drop(usize),
    Cut(usize, u64),
    Fork(usize),
    Free(usize, i32),
    Reset,
    Style(Style),
    Spoil(bool),
    RefuseNext(i64),
    Swap,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let styles = prop_oneof![
        Just(Style::Heads),
        Just(Style::Shared),
        Just(Style::Ranges),
        Just(Style::Rewrite),
        Just(Style::Keep(KVH_REASON_OTHER))
    ];
    let step = prop_oneof![
        2 => (1u64..40).prop_map(Step::Begin),
        6 => (0usize..4, 0u64..9).prop_map(|(which, tokens)| Step::Append(which, tokens)),
        8 => (0usize..4, 1i32..3, any::<bool>()).prop_map(|(which, event, fresh)| Step::Plan(which, event, fresh)),
        8 => (0usize..4).prop_map(Step::Commit),
        1 => (0usize..4).prop_map(Step::Drop),
        2 => (0usize..4, 1u64..6).prop_map(|(which, tokens)| Step::Cut(which, tokens)),
        1 => (0usize..4).prop_map(Step::Fork),
        1 => (0usize..4, 0i32..4).prop_map(|(which, reason)| Step::Free(which, reason)),
        1 => Just(Step::Reset),
        2 => styles.prop_map(Step::Style),
        1 => any::<bool>().prop_map(Step::Spoil),
        1 => (0i64..12).prop_map(Step::RefuseNext),
        1 => Just(Step::Swap),
    ];
    proptest::collection::vec(step, 1..60)
}

/// A sequence with the ticket that the model thinks is open, and the style of its plan.
struct Known {
    cache: Cache,
    ticket: Option<(u64, Style)>,
}

fn run(shape: Shape, steps: Vec<Step>) {
    let new_script = || Arc::new(Script { grown_every: 1, ..Script::default() });
    let mut script = new_script();
    let mut scripts = vec![script.clone()];
    let engine = Engine::with(shape, &script);
    let mut known: Vec<Known> = Vec::new();
    let mut ended: Vec<u64> = Vec::new();
    let pick = |which: usize, known: &[Known]| (!known.is_empty()).then(|| which % known.len());
    for step in steps {
        match step {
            Step::Begin(tokens) if known.len() < 6 => {
                known.push(Known { cache: engine.begin(tokens), ticket: None });
            }
            Step::Append(which, tokens) => {
                if let Some(which) = pick(which, &known).filter(|&which| known[which].cache.lengths(0)[0] < 80) {
                    known[which].cache.append(tokens);
                }
            }
            Step::Plan(which, event, fresh) => {
                let Some(which) = pick(which, &known).filter(|&which| known[which].ticket.is_none()) else { continue };
                let style = *script.style.lock().unwrap();
                let planned = engine.plan(&mut known[which].cache, event, fresh);
                known[which].ticket = planned.ok().map(|ticket| (ticket, style));
                engine.watch.refuse.store(-1, SeqCst);
            }
            Step::Commit(which) => {
                let Some(which) = pick(which, &known) else { continue };
                let Some((ticket, style)) = known[which].ticket.take() else { continue };
                let now = std::mem::replace(&mut *script.style.lock().unwrap(), style);
                engine.commit(&mut known[which].cache, &script, ticket);
                *script.style.lock().unwrap() = now;
            }
            Step::Drop(which) => {
                let Some(which) = pick(which, &known) else { continue };
                if let Some((ticket, _)) = known[which].ticket.take() {
                    engine.drop_ticket(ticket, KVH_REASON_NO_ROOM).unwrap();
                }
            }
            Step::Cut(which, tokens) => {
                let Some(which) = pick(which, &known) else { continue };
                let of = &mut known[which];
                // Only rows that no commit has moved: with other rows for each head a cut would mix positions.
                let rows = of.cache.rows.iter().flatten().flatten();
                let plain = rows.map(|rows| {
                    let tail = rows.iter().rev().zip((0..of.cache.next_position).rev());
                    tail.take_while(|(row, position)| row.0 == *position).count() as u64
                });
                let tokens = tokens.min(plain.min().unwrap_or(0)).min(of.cache.lengths(0)[0].saturating_sub(1));
                of.cache.truncate(tokens);
                engine.cut(&of.cache).unwrap();
                let dropped =
                    of.ticket.filter(|(ticket, _)| engine.verdict(*ticket).unwrap().0 == KVHOOK_VERDICT_DROPPED);
                let below = of.ticket.is_some() && of.cache.below_plan();
                assert_eq!(dropped.is_some(), below);
                of.ticket = of.ticket.filter(|_| !below);
            }
            Step::Fork(which) if known.len() < 6 => {
                let Some(which) = pick(which, &known) else { continue };
                let of = &mut known[which];
                // The copy's rows hold what the original's hold; later ones differ.
                let cache = Cache { uid: engine.fork(of.cache.uid).unwrap(), ..of.cache.clone() };
                if let Some((ticket, _)) = of.ticket.take() {
                    assert_eq!(engine.verdict(ticket).unwrap().0, KVHOOK_VERDICT_DROPPED);
                }
                known.push(Known { cache, ticket: None });
            }
            Step::Free(which, reason) => {
                let Some(which) = pick(which, &known) else { continue };
                let of = known.swap_remove(which);
                engine.free(of.cache.uid, reason).unwrap();
                assert_eq!(engine.free(of.cache.uid, reason).unwrap_err().0, KVHOOK_ERR_UNKNOWN_UID);
                ended.push(of.cache.uid);
            }
            Step::Reset => {
                common::call(|error| unsafe {
                    kvhook_host::c_api::kvhook_reset(engine.raw, std::ptr::null_mut(), error)
                })
                .unwrap();
                ended.extend(known.drain(..).map(|of| of.cache.uid));
            }
            Step::Style(style) => *script.style.lock().unwrap() = style,
            Step::Spoil(on) => {
                *script.tamper.lock().unwrap() = on.then(|| {
                    Box::new(|rank: u32, plan: &mut KvhPlan, _: &mut [KvhLayerPlan]| {
                        if rank == 1 {
                            plan.kind = 9;
                        }
                    }) as _
                });
            }
            Step::RefuseNext(place) => {
                engine.watch.made.store(0, SeqCst);
                engine.watch.refuse.store(place, SeqCst);
            }
            Step::Swap => {
                script = new_script();
                scripts.push(script.clone());
                engine.arm(&ArmSpec::new("arm", "scripted", script.register()));
            }
            Step::Begin(_) | Step::Fork(_) => {}
        }
        for of in &known {
            engine.verify(&of.cache);
        }
    }
    engine.watch.refuse.store(-1, SeqCst);
    for of in known {
        engine.free(of.cache.uid, KVH_FREE_FINISHED).unwrap();
        ended.push(of.cache.uid);
    }
    for uid in ended {
        for (script, rank) in scripts.iter().flat_map(|script| (0..shape.ranks as u32).map(move |rank| (script, rank)))
        {
            let times = script.frees_of(uid).iter().filter(|free| free.0 == rank).count();
            assert!(times <= 1, "sequence {uid} was freed {times} times on rank {rank}");
        }
    }
    assert_eq!(engine.watch.live.load(SeqCst), 0);
    assert_eq!(engine.figures("arm").0.live, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn contiguous(steps in steps()) {
        run(Shape { ranks: 2, dtype: F32, ..SMALL }, steps);
    }

    #[test]
    fn paged(steps in steps()) {
        run(Shape { ranks: 2, dtype: BF16, block_size: 4, token_major: false, ..SMALL }, steps);
    }
}
