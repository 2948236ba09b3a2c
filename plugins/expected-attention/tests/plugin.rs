//! The plugin through its one symbol, as a host calls it.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

mod common;

use common::{Case, cases};
use kvhook_abi::raw::{KVH_PHASE_DECODE, KVH_PHASE_PREFILL, KVH_REASON_QUERIES_MISSING};
use kvhook_testing::assertions::assert_top;
use kvhook_testing::raw::{KVH_CAN_ALL_QUERIES, KvhPluginEntry};
use kvhook_testing::{Answer, Dtype, Engine, Fault, Form, Instance, Layer, PerHead, Seen, Sequence, Shape};

const FORMS: [Form; 3] = [Form::HeadMajor, Form::TokenMajor, Form::Paged { block: 16 }];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

fn entry() -> &'static KvhPluginEntry {
    kvhook_testing::entry!(kvhook_expected_attention)
}

/// The cases that the mock engine's model has the RoPE of.
fn usual_cases() -> impl Iterator<Item = Case> {
    cases().into_iter().filter(|case| {
        case.pairing == "half_split" && case.rotary_dim == 16 && case.frequencies.is_empty() && case.q.len() > 16
    })
}

fn instance(case: &Case, config: &str) -> Instance {
    let shape = Shape::new(1, case.k.len(), case.q[0].len(), case.k[0][0].len());
    let own = format!("future={},covariance={},epsilon={}", case.future, case.covariance, case.epsilon);
    Engine::new(shape).create(entry(), format!("{own},{config}")).unwrap()
}

fn sequence(uid: u64, case: &Case, dtype: Dtype, form: Form) -> Sequence {
    let mut sequence = Sequence::new(uid, vec![Layer::new(case.k.clone(), case.v.clone(), dtype, form)]);
    sequence.queries_seen = sequence.prompt_length;
    sequence
}

fn seen(uid: u64, case: &Case, first: usize, queries: &[Vec<Vec<f32>>]) -> Seen {
    let prompt_length = case.q.len() as u64;
    Seen { uid, prompt_length, first_position: first as u64, queries: queries.to_vec() }
}

#[test]
fn the_best_by_pytorchs_scores_stay() {
    for case in usual_cases() {
        for (dtype, form) in DTYPES.into_iter().flat_map(|dtype| FORMS.map(|form| (dtype, form))) {
            let mut instance = instance(&case, "keep=0.4,recent=8");
            instance.see(0, KVH_PHASE_PREFILL, &[seen(1, &case, 0, &case.q)], dtype).unwrap();
            let answer = instance.plan_one(&sequence(1, &case, dtype, form)).unwrap();
            let plan = &answer.select()[0];
            assert_eq!(plan.count, case.q.len() * 2 / 5);
            for (rows, scores) in plan.rows.iter().zip(&case.scores) {
                assert_top(scores, rows, 4, 8, 1e-5);
            }
            assert_ne!(plan.rows[0], plan.rows[1], "{}: heads choose for themselves", case.name);
        }
    }
}

#[test]
fn steps_of_any_size_alone_or_in_a_batch_give_the_same_plan() {
    let case = usual_cases().next().unwrap();
    let other = Case { q: case.q.iter().rev().cloned().collect(), ..usual_cases().next().unwrap() };
    let prompt = |uid, case: &Case| sequence(uid, case, Dtype::F32, Form::TokenMajor);
    let mut whole = instance(&case, "budget=20,recent=4");
    whole.see(0, KVH_PHASE_PREFILL, &[seen(1, &case, 0, &case.q)], Dtype::F32).unwrap();
    let expected = whole.plan_one(&prompt(1, &case)).unwrap();

    for sizes in [vec![1; 80], vec![3, 77], vec![4, 1, 75], vec![2, 2, 40, 36]] {
        let mut instance = instance(&case, "budget=20,recent=4");
        let mut first = 0;
        for size in sizes {
            let part = |uid, case: &Case| seen(uid, case, first, &case.q[first..first + size]);
            // The other sequence stands before it, so that its queries are not the step's first.
            let parts = [part(7, &other), part(8, &case)];
            instance.see(0, KVH_PHASE_PREFILL, &parts, Dtype::F32).unwrap();
            first += size;
        }
        let answers = instance.plan(&[prompt(7, &other), prompt(8, &case)]).unwrap();
        assert_eq!(answers[1], expected);
        assert_ne!(answers[0], expected, "another sequence's queries count for it alone");
    }
}

#[test]
fn a_sequence_of_which_a_query_is_missing_is_kept() {
    let case = usual_cases().next().unwrap();
    let prompt = |uid| sequence(uid, &case, Dtype::F32, Form::TokenMajor);
    let mut instance = instance(&case, "keep=0.5");
    let kept = |answer: Answer| assert_eq!(answer.reason(), KVH_REASON_QUERIES_MISSING);
    kept(instance.plan_one(&prompt(1)).unwrap());
    // From the middle on, as behind a prefix that is shared.
    instance.see(0, KVH_PHASE_PREFILL, &[seen(2, &case, 16, &case.q[16..])], Dtype::F32).unwrap();
    kept(instance.plan_one(&prompt(2)).unwrap());
    // A gap.
    instance.see(0, KVH_PHASE_PREFILL, &[seen(3, &case, 0, &case.q[..16])], Dtype::F32).unwrap();
    instance.see(0, KVH_PHASE_PREFILL, &[seen(3, &case, 32, &case.q[32..])], Dtype::F32).unwrap();
    kept(instance.plan_one(&prompt(3)).unwrap());
    // Freed: its uid never comes again, and nothing of it is left.
    instance.see(0, KVH_PHASE_PREFILL, &[seen(4, &case, 0, &case.q)], Dtype::F32).unwrap();
    instance.plan_one(&prompt(4)).unwrap().select();
    instance.free(4).unwrap();
    kept(instance.plan_one(&prompt(4)).unwrap());
    // The same step twice counts once.
    for _ in 0..2 {
        instance.see(0, KVH_PHASE_PREFILL, &[seen(5, &case, 0, &case.q)], Dtype::F32).unwrap();
    }
    instance.plan_one(&prompt(5)).unwrap().select();
}

/// A rank has the statistics of its own heads only, so its plan is that part of the whole model's.
#[test]
fn each_rank_plans_its_own_heads() {
    let case = usual_cases().next().unwrap();
    let mut whole = instance(&case, "keep=0.3,recent=8");
    whole.see(0, KVH_PHASE_PREFILL, &[seen(1, &case, 0, &case.q)], Dtype::F32).unwrap();
    let whole = whole.plan_one(&sequence(1, &case, Dtype::F32, Form::HeadMajor)).unwrap();
    let group = case.q[0].len() / case.k.len();
    for rank in 0..case.k.len() {
        let heads = |q: &PerHead| q.iter().map(|q| q[rank * group..(rank + 1) * group].to_vec()).collect();
        let part = Case {
            q: heads(&case.q),
            k: vec![case.k[rank].clone()],
            v: vec![case.v[rank].clone()],
            ..usual_cases().next().unwrap()
        };
        let mut own = instance(&part, "keep=0.3,recent=8");
        own.see(0, KVH_PHASE_PREFILL, &[seen(1, &part, 0, &part.q)], Dtype::F32).unwrap();
        let own = own.plan_one(&sequence(1, &part, Dtype::F32, Form::HeadMajor)).unwrap();
        assert_eq!(own.select()[0].rows[0], whole.select()[0].rows[rank]);
    }
}

#[test]
fn what_it_needs_is_every_query() {
    let case = usual_cases().next().unwrap();
    let needs = instance(&case, "keep=0.5").needs().unwrap();
    assert_eq!(needs.window_queries, u32::MAX);
    assert_eq!(needs.phases, KVH_PHASE_PREFILL);
    assert_eq!(needs.must & KVH_CAN_ALL_QUERIES, KVH_CAN_ALL_QUERIES);
    let needs = instance(&case, "every=64").needs().unwrap();
    assert_eq!(needs.phases, KVH_PHASE_PREFILL | KVH_PHASE_DECODE);
}

#[test]
fn a_wrong_config_is_refused_by_the_key() {
    let engine = Engine::new(Shape::new(1, 1, 1, 16));
    for (config, key) in
        [("future=0", "future"), ("epsilon=-1", "epsilon"), ("covariance=2", "covariance"), ("futur=1", "future")]
    {
        match engine.create(entry(), config) {
            Err(Fault::Refused { message, .. }) => assert!(message.contains(key), "{message}"),
            Err(fault) => panic!("{fault}"),
            Ok(_) => panic!("{config} is taken"),
        }
    }
}
