//! The rule about arguments that are well-formed and that no good engine gives.

use kvhook_abi::raw::*;

use super::broken;
use super::subject::Subject;
use crate::cache::Layer;
use crate::engine::{Engine, Shape};
use crate::fault::Fault;
use crate::sequence::Sequence;

/// An element type that nobody has.
const NO_DTYPE: KvhDtype = KvhDtype { code: 99, bits: 3, lanes: 0 };
const TOKENS: usize = 60;

pub(super) fn strange_arguments_are_survived(subject: &Subject) -> Result<(), Fault> {
    for (what, engine) in engines(subject) {
        match engine.create(subject.entry, &subject.config) {
            Ok(mut instance) => {
                let prompt = Sequence::new(1, Vec::new());
                survived(what, instance.plan(&[prompt]))?;
            }
            Err(fault) => survived::<()>(what, Err(fault))?,
        }
    }
    for (what, sequences) in sequences(subject) {
        let mut instance = subject.instance()?;
        survived(what, instance.plan(&sequences))?;
        // The next call is an ordinary one.
        let ordinary = instance.plan_one(&subject.prompt(100, 1, TOKENS));
        if let Err(fault) = ordinary {
            return broken(format!("after {what}, for an ordinary prompt: {fault}"));
        }
    }
    Ok(())
}

/// A refusal is an answer, and a plan that is no good is dropped by every host. A panic ends the instance, and nothing
/// makes up for a write.
fn survived<T>(what: &str, outcome: Result<T, Fault>) -> Result<(), Fault> {
    match outcome {
        Err(Fault::Refused { status: KVH_ERR_PANIC, message }) => {
            broken(format!("given {what}, the plugin panicked: {message}"))
        }
        Err(
            fault @ (Fault::CacheWritten { .. }
            | Fault::Outside { .. }
            | Fault::TailWritten { .. }
            | Fault::InstanceWritten
            | Fault::Text { .. }),
        ) => broken(format!("given {what}: {fault}")),
        _ => Ok(()),
    }
}

fn engines(subject: &Subject) -> Vec<(&'static str, Engine)> {
    let engine = subject.default_engine();
    let shape = subject.shape;
    let of = |shape: Shape| Engine { shape, ..engine.clone() };
    vec![
        ("a model whose cache has no known element type", Engine { cache_dtype: NO_DTYPE, ..engine.clone() }),
        ("an engine that offers nothing", Engine { can: 0, max_window_queries: 0, ..engine.clone() }),
        ("an engine that offers what does not exist", Engine { can: u64::MAX, ..engine.clone() }),
        ("blocks of four billion tokens", Engine { block_size: u32::MAX, ..engine.clone() }),
        ("a model without layers", of(Shape { layers: 0, ..shape })),
        ("a model without KV heads", of(Shape { kv_heads: 0, total_kv_heads: 0, ..shape })),
        ("a model without query heads", of(Shape { q_heads: 0, ..shape })),
        ("a model with heads of no channels", of(Shape { head_dim: 0, ..shape })),
        ("a model with heads of three channels", of(Shape { head_dim: 3, ..shape })),
        ("a rank beyond the model's heads", of(Shape { first_kv_head: 1 << 20, ..shape })),
        ("layers of a kind that does not exist", Engine { kinds: vec![77; shape.layers], ..engine.clone() }),
        ("layers without a cache", Engine { kinds: vec![KVH_LAYER_NONE; shape.layers], ..engine.clone() }),
    ]
}

fn sequences(subject: &Subject) -> Vec<(&'static str, Vec<Sequence>)> {
    let prompt = || subject.prompt(1, 1, TOKENS);
    let with = |change: &dyn Fn(&mut Sequence)| {
        let mut sequence = prompt();
        change(&mut sequence);
        vec![sequence]
    };
    let segment = |kind, start, length| KvhSegment { kind, reserved0: 0, start, length };
    let segments = |segments: Vec<KvhSegment>| with(&move |sequence| sequence.segments.clone_from(&segments));
    let narrow =
        |layer: &Layer| Layer::new(layer.keys[..1].to_vec(), layer.values[..1].to_vec(), layer.dtype(), layer.form());
    vec![
        ("no sequence", Vec::new()),
        ("a sequence without layers", with(&|sequence| sequence.layers.clear())),
        ("fewer layers than the model has", with(&|sequence| sequence.layers.truncate(1))),
        ("more layers than the model has", with(&|sequence| sequence.layers.extend(sequence.layers.clone()))),
        ("a sequence without rows", vec![subject.prompt(1, 1, 0)]),
        (
            "fewer KV heads than the model has",
            with(&|sequence| {
                sequence.layers = sequence.layers.iter().map(narrow).collect();
            }),
        ),
        (
            "layers of a kind that does not exist",
            with(&|sequence| {
                sequence.layers.iter_mut().for_each(|layer| layer.kind = 77);
            }),
        ),
        (
            "recurrent layers",
            with(&|sequence| {
                sequence.layers.iter_mut().for_each(|layer| layer.kind = KVH_LAYER_LINEAR);
            }),
        ),
        (
            "values of no known element type",
            with(&|sequence| {
                sequence.layers.iter_mut().for_each(|layer| layer.v_dtype = NO_DTYPE);
            }),
        ),
        (
            "the greatest numbers",
            with(&|sequence| {
                (sequence.uid, sequence.epoch) = (u64::MAX, u64::MAX);
                (sequence.prompt_length, sequence.queries_seen) = (u64::MAX, u64::MAX);
            }),
        ),
        ("a next position behind its rows", with(&|sequence| sequence.next_position = 0)),
        ("the greatest next position", with(&|sequence| sequence.next_position = u64::MAX)),
        ("a prompt of no tokens", with(&|sequence| sequence.prompt_length = 0)),
        (
            "segments that overlap",
            segments(vec![segment(KVH_SEGMENT_IMAGE, 10, 30), segment(KVH_SEGMENT_IMAGE, 20, 30)]),
        ),
        ("a segment behind the prompt", segments(vec![segment(KVH_SEGMENT_IMAGE, 1 << 40, 30)])),
        ("a segment that ends behind all numbers", segments(vec![segment(KVH_SEGMENT_IMAGE, 10, u64::MAX)])),
        ("a segment of a kind that does not exist", segments(vec![segment(77, 10, 30)])),
        ("an empty segment", segments(vec![segment(KVH_SEGMENT_IMAGE, 10, 0)])),
        ("one sequence twice", vec![prompt(), prompt()]),
    ]
}
