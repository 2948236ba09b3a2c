//! Rules about plans.

use kvhook_abi::KVH_ON_GROWN_1;
use kvhook_abi::kernels::Dtype;
use kvhook_abi::raw::*;

use super::subject::{FORM, Subject, end};
use super::{broken, holds};
use crate::answer::Answer;
use crate::cache::{Form, Layer};
use crate::engine::Engine;
use crate::fault::Fault;
use crate::instance::{Bounded, Event};
use crate::random::Random;
use crate::sequence::Sequence;

/// Tokens of the prompts that are not about lengths.
const TOKENS: usize = 150;

/// What the plugin plans for prompt 1 in a fresh instance.
fn alone(subject: &Subject) -> Result<Answer, Fault> {
    subject.run_one(&mut subject.instance()?, &subject.prompt(1, 1, TOKENS), 1)
}

fn same(found: &Answer, expected: &Answer, when: &str) -> Result<(), Fault> {
    holds(found == expected, || format!("another plan {when}"))
}

pub(super) fn larger_structs_are_taken(subject: &Subject) -> Result<(), Fault> {
    let engine = Engine { extra: 64, ..subject.engine(Dtype::F32, FORM) };
    let mut instance = engine.create(subject.entry, &subject.config)?;
    let answer = subject.run_one(&mut instance, &subject.prompt(1, 1, TOKENS), 1)?;
    same(&answer, &alone(subject)?, "where the host's structs are 64 bytes larger")
}

pub(super) fn keep_the_bound(subject: &Subject) -> Result<(), Fault> {
    let engine = subject.default_engine();
    // Where counts may depend on data, a plan may keep less than its bound, and never more.
    let data_counts = Engine { can: engine.can | KVH_CAN_DATA_COUNTS, ..engine.clone() };
    [engine, data_counts].iter().try_for_each(|engine| keeps_the_bound(subject, engine))
}

fn keeps_the_bound(subject: &Subject, engine: &Engine) -> Result<(), Fault> {
    let mut instance = engine.create(subject.entry, &subject.config)?;
    let mut random = Random::new(subject.seed);
    let mut lengths = vec![1, 2, 3, 15, 16, 17, 64, 257];
    lengths.extend((0..8).map(|_| 1 + random.below(300) as usize));
    for (uid, &tokens) in (1..).zip(&lengths) {
        let image = tokens as u64 / 3;
        let plain = subject.prompt(uid, uid, tokens);
        let prompt = if uid % 2 == 0 && image > 0 { plain.image(image, image) } else { plain };
        let bound = instance.bound(&prompt)?;
        holds(instance.bound(&prompt)? == bound, || format!("two bounds for the same {tokens} rows"))?;
        // Another rank's data: the bound must not depend on it.
        let other = Sequence { layers: subject.prompt(uid, uid + 1000, tokens).layers, ..prompt.clone() };
        holds(instance.bound(&other)? == bound, || format!("another bound for other values of {tokens} rows"))?;
        // A host does not ask for a plan where nothing would be dropped.
        if matches!(bound, Bounded::Rows(_)) {
            subject.run(&mut instance, std::slice::from_ref(&prompt), &[uid])?;
            end(&mut instance, uid)?;
        }
    }
    Ok(())
}

pub(super) fn every_dtype_and_layout(subject: &Subject) -> Result<String, Fault> {
    let (mut planned, mut refused) = (Vec::new(), Vec::new());
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let mut first: Option<(Form, Answer)> = None;
        for form in Form::ALL {
            let mut instance = match subject.engine(dtype, form).create(subject.entry, &subject.config) {
                Err(Fault::Refused { status: KVH_ERR_UNSUPPORTED | KVH_ERR_CONFIG, .. }) => {
                    refused.push(format!("{dtype} {form:?}"));
                    continue;
                }
                outcome => outcome?,
            };
            planned.push((dtype, form));
            let answer = subject.run_one(&mut instance, &subject.prompt_in(1, 1, TOKENS, dtype, form), 1)?;
            match &first {
                _ if matches!(answer, Answer::Keep { reason: KVH_REASON_UNSUPPORTED, .. }) => {}
                // Whole blocks may be kept, which a contiguous cache has not.
                Some((before, expected)) if (before.block() == 0) == (form.block() == 0) => {
                    same(&answer, expected, &format!("for {dtype} as {form:?} than as {before:?}"))?;
                }
                _ => first = Some((form, answer)),
            }
        }
    }
    holds(!planned.is_empty(), || format!("it refuses every dtype and layout: {}", refused.join(", ")))?;
    Ok(if refused.is_empty() { String::new() } else { format!("refuses {}", refused.join(", ")) })
}

/// Compressions of one sequence after that of its prompt.
const ROUNDS: usize = 4;
/// Tokens by which it grows in between, where the plugin wants more.
const MOST_GROWN: usize = 256;

pub(super) fn grown_keeps_the_rules(subject: &Subject) -> Result<String, Fault> {
    let mut instances = [subject.instance()?, subject.instance()?];
    let grown_every = instances[0].needs()?.grown_every;
    // SAFETY: the table that the id names.
    let table = unsafe { instances[0].hook::<KvhOnGrown1>(KVH_ON_GROWN_1) };
    if grown_every == 0 {
        return Ok("this config asks for no `on_grown`".into());
    }
    holds(table.is_some(), || format!("asks for `on_grown` each {grown_every} tokens and does not implement it"))?;
    let grown = usize::try_from(grown_every).unwrap_or(usize::MAX).min(MOST_GROWN);
    let mut stories = Vec::new();
    for instance in &mut instances {
        let mut random = Random::new(subject.seed);
        let mut sequence = subject.prompt(1, 1, TOKENS);
        let first = subject.run(instance, std::slice::from_ref(&sequence), &[1])?;
        let mut story = first;
        for _ in 0..ROUNDS {
            if let Some(answer) = story.last() {
                sequence = sequence.committed(answer, grown, &mut random);
            }
            story.append(&mut instance.prepare(std::slice::from_ref(&sequence), Event::Grown)?);
        }
        end(instance, 1)?;
        stories.push(story);
    }
    holds(stories[0] == stories[1], || "another plan for the same story of prompt, commits and growth".into())?;
    let kept = stories[0].iter().filter(|answer| matches!(answer, Answer::Keep { .. })).count();
    Ok(if kept == 0 { String::new() } else { format!("{kept} of {} plans keep", stories[0].len()) })
}

pub(super) fn same_in_same_out(subject: &Subject) -> Result<(), Fault> {
    let expected = alone(subject)?;
    same(&alone(subject)?, &expected, "in another instance")?;
    let mut instance = subject.instance()?;
    for uid in [1, 9_000_000_001] {
        let again = subject.run_one(&mut instance, &subject.prompt(uid, 1, TOKENS), 1)?;
        same(&again, &expected, &format!("as sequence {uid} of an instance that goes on"))?;
    }
    let data = [5, 1, 6, 7];
    let batch: Vec<Sequence> = (20..)
        .zip([40, TOKENS, 333, 17])
        .zip(data)
        .map(|((uid, tokens), data)| subject.prompt(uid, data, tokens))
        .collect();
    let answers = subject.run(&mut instance, &batch, &data)?;
    same(&answers[1], &expected, "in a batch of four")
}

pub(super) fn refused_memory_is_survived(subject: &Subject) -> Result<(), Fault> {
    let expected = alone(subject)?;
    let mut instance = subject.instance()?;
    instance.host().refuse_memory(true);
    match subject.run(&mut instance, &[subject.prompt(1, 1, TOKENS)], &[1]) {
        Ok(_) | Err(Fault::Refused { status: KVH_ERR_OUT_OF_MEMORY, .. }) => {}
        Err(Fault::Refused { status, message }) => {
            return broken(format!(
                "refused memory gives status {status} ({message}); expected a keep, or out of memory"
            ));
        }
        Err(fault) => return Err(fault),
    }
    instance.host().refuse_memory(false);
    end(&mut instance, 1)?;
    let after = subject.run_one(&mut instance, &subject.prompt(2, 1, TOKENS), 1)?;
    same(&after, &expected, "after memory was refused once")
}

pub(super) fn values_that_are_no_numbers(subject: &Subject) -> Result<(), Fault> {
    let expected = alone(subject)?;
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 0.0] {
        for all in [false, true] {
            let mut instance = subject.instance()?;
            let spoiled = |layer: &Layer| {
                let mut rows = [layer.keys.clone(), layer.values.clone()];
                for head in rows.iter_mut().flatten() {
                    let length = head.len();
                    let some = head.iter_mut().enumerate().filter(|(token, _)| all || *token == length / 2);
                    some.for_each(|(_, row)| row.fill(value));
                }
                let [keys, values] = rows;
                Layer::new(keys, values, layer.dtype(), layer.form())
            };
            let good = subject.prompt(2, 1, TOKENS);
            let bad = subject.prompt(1, 2, TOKENS);
            let bad = Sequence { layers: bad.layers.iter().map(spoiled).collect(), ..bad };
            let answers = match subject.run(&mut instance, &[bad, good], &[2, 1]) {
                Ok(answers) => answers,
                // Rewritten rows may not be NaN: the plugin has to look. An error is an answer, a panic is none.
                Err(Fault::Refused { status, .. }) if status != KVH_ERR_PANIC => continue,
                Err(fault) => return Err(fault),
            };
            same(&answers[1], &expected, &format!("beside a sequence whose cache holds {value}"))?;
        }
    }
    Ok(())
}
