//! The mock engine notices what this plugin does wrong: each fault of the mock's can occur.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

use kvhook_abi::raw::*;
use kvhook_testing::*;

const SHAPE: Shape = Shape::new(2, 2, 4, 8);

fn instance(config: &str) -> Instance {
    let engine = Engine { extra: 16, ..Engine::new(SHAPE) };
    engine.create(entry!(kvhook_faulty), config).unwrap()
}

fn prompt(uid: u64) -> Sequence {
    Sequence::random(uid, 40, SHAPE, Dtype::F16, Form::Paged { block: 16 }, &mut Random::new(uid))
}

#[test]
fn a_plugin_that_does_nothing_wrong_is_told_so() {
    for plan in ["select", "select-heads", "ranges", "rewrite"] {
        for form in Form::ALL {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                let mut instance = instance(&format!("plan={plan},allocate=100,phases=3,every=8"));
                let prompts = [1, 2].map(|uid| Sequence::random(uid, 40, SHAPE, dtype, form, &mut Random::new(uid)));
                let queries = vec![vec![vec![0.5; SHAPE.head_dim]; SHAPE.q_heads]; 3];
                let part = Seen { uid: 2, prompt_length: 40, first_position: 37, queries };
                instance.see(1, KVH_PHASE_PREFILL, &[part], dtype).unwrap();
                let answers = instance.plan(&prompts).unwrap();
                assert_eq!(instance.prepare(&prompts, Event::Grown).unwrap(), answers);
                match plan {
                    "rewrite" => {
                        // Every second row, copied.
                        let (new, layer) = (&answers[1].rewrite()[1], &prompts[1].layers[1]);
                        let rows =
                            |of: &PerHead| of.iter().map(|head| head.iter().step_by(2).cloned().collect()).collect();
                        let (keys, values): (PerHead, PerHead) = (rows(&layer.keys), rows(&layer.values));
                        assert_eq!((&new.keys, &new.values), (&keys, &values), "{form:?} {dtype}");
                        assert_eq!(new.positions[1], (0..20).map(|row| 2 * row).collect::<Vec<u32>>());
                    }
                    "ranges" => {
                        let layer = &answers[0].select()[0];
                        assert!(layer.as_ranges);
                        assert_eq!(layer.rows[1], (0..10).chain(30..40).collect::<Vec<u32>>());
                    }
                    _ => {
                        let rows = &answers[0].select()[0].rows;
                        assert_eq!(rows[0], (0..20).map(|row| 2 * row).collect::<Vec<u32>>());
                        assert_eq!(rows[0] == rows[1], plan == "select");
                    }
                }
                assert_eq!(instance.host().lent(KVH_MEMORY_SEQUENCE), 500, "two at each plan, one at the step");
                instance.free(1).unwrap();
                instance.free(2).unwrap();
                assert_eq!(instance.host().lent(KVH_MEMORY_SEQUENCE), 0);
            }
        }
    }
}

#[test]
fn what_it_does_wrong_is_named() {
    let plan = |layer, part: &'static str| move |fault: &Fault| matches!(fault, Fault::Plan { layer: at, what } if *at == layer && what.contains(part));
    let count =
        |found| move |fault: &Fault| matches!(fault, Fault::Count { layer: 0, count, bound: 20 } if *count == found);
    type Expected = Box<dyn Fn(&Fault) -> bool>;
    let cases: [(&str, Expected); 22] = [
        ("damage=out-of-range", Box::new(plan(0, "row 1048614 of 40"))),
        ("damage=out-of-range,plan=ranges", Box::new(plan(0, "leaves the layer's rows"))),
        ("damage=negative,layer=1", Box::new(plan(1, "row 4294967295 of 40"))),
        ("damage=negative,plan=ranges", Box::new(plan(0, "leaves the layer's rows"))),
        ("damage=descending", Box::new(plan(0, "do not ascend: 36 after 38 at place 19"))),
        ("damage=descending,plan=ranges", Box::new(plan(0, "do not ascend"))),
        ("damage=repeated,plan=select-heads", Box::new(plan(0, "do not ascend: 38 after 38"))),
        ("damage=too-many", Box::new(count(21))),
        ("damage=no-rows", Box::new(count(0))),
        ("damage=fewer", Box::new(count(19))),
        ("damage=null-array", Box::new(plan(0, "neither"))),
        ("damage=both", Box::new(plan(0, "both"))),
        ("damage=unknown-kind", Box::new(|fault| *fault == Fault::Kind { kind: 77, flags: 0 })),
        ("damage=sum,plan=ranges", Box::new(plan(0, "hold 19 rows, its count is 20"))),
        ("damage=position,plan=rewrite", Box::new(plan(0, "position 1048614, and the next is 40"))),
        ("damage=not-lent,plan=rewrite", Box::new(plan(0, "NaN"))),
        ("damage=moved", Box::new(|fault| matches!(fault, Fault::Kind { flags: KVH_PLAN_FLAG_MOVED_POSITIONS, .. }))),
        ("damage=write-cache", Box::new(|fault| matches!(fault, Fault::CacheWritten { tensor: "K", at: 0, .. }))),
        ("damage=write-tail", Box::new(|fault| *fault == Fault::TailWritten { array: "plan.layers" })),
        ("damage=struct-size", Box::new(|fault| matches!(fault, Fault::HostField { found: 8, .. }))),
        ("answer=above", Box::new(|fault| *fault == Fault::Bound { layer: 0, bound: 41, length: 40 })),
        ("answer=too-short", Box::new(|fault| *fault == Fault::Unannounced { reason: KVH_REASON_TOO_SHORT })),
    ];
    for (config, expected) in cases {
        let fault = instance(config).plan_one(&prompt(1)).unwrap_err();
        assert!(expected(&fault), "{config}: {fault}");
    }
}

#[test]
fn memory_that_was_not_asked_for_is_guarded() {
    // Each layer's list has memory of its own, of 20 indices.
    let fault = instance("damage=write-memory").plan_one(&prompt(1)).unwrap_err();
    assert!(matches!(fault, Fault::Outside { at: 80.., .. }), "{fault}");
}

#[test]
fn errors_carry_the_plugins_words() {
    for (config, status) in [("prefill_done=fail", KVH_ERR_INTERNAL), ("prefill_done=panic", KVH_ERR_PANIC)] {
        match instance(config).plan_one(&prompt(1)).unwrap_err() {
            Fault::Refused { status: found, message } => {
                assert_eq!(found, status);
                assert!(message.contains("on_prefill_done goes wrong"), "{message}");
            }
            fault => panic!("{fault}"),
        }
    }
    let mut refused = instance("allocate=8");
    refused.host().refuse_memory(true);
    let fault = refused.plan_one(&prompt(1)).unwrap_err();
    assert!(matches!(fault, Fault::Refused { status: KVH_ERR_OUT_OF_MEMORY, .. }), "{fault}");
}
