//! Runs tasks side by side, each on a runner of its own thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvhook_bench::linear_map::SHIFT;
use kvhook_bench::measure::Gates;
use kvhook_bench::passages::Text;
use kvhook_bench::{Error, Result, model};
use kvhook_engine::cache::{CacheKind, read_rows};
use kvhook_engine::quality::{argmax, mean_kl, top1_agreement};
use kvhook_engine::runner::LogitsRow;
use kvhook_engine::{Begin, CacheConfig, KvDtype, Model, Runner, Scoring, SequenceId};

use crate::arms::{Arm, RECENT, SINKS, STRIDE, TRUNCATE_STRIDE, WeightFiles};
use crate::tasks::{Ask, Group, Task};

/// Rows of a block.
const BLOCK: usize = 16;
/// Tokens of a prefill step.
const CHUNK: usize = 512;
/// Tokens in which a passkey must come out.
const ANSWER: usize = 8;
/// Rows and scored tokens for the comparison of the two strides: no tail at `f` = 2.
const CHECKED: usize = SINKS + RECENT + 2 * 200;
const CHECKED_TOKENS: usize = 64;
/// Most KL between the two strides, which differ in values below 0.004 only. Rounding a cache to bf16 makes 2.6e-5.
const SAME: f64 = 1e-5;

/// One arm on one task.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub struct Value {
    /// KL in nats a token; or the part that was right.
    pub value: f64,
    /// Part of the tokens where the likeliest one is the full cache's; of divergences only.
    pub agreement: f64,
}

/// For each task those of the full cache, then of each arm; none where it has not run.
pub type Measured = Vec<Vec<Value>>;

/// Runs everything that is not known, long prompts first; `save` gets all values after each task.
///
/// # Errors
/// The first one.
pub fn run(
    model: &Arc<Model>,
    groups: &[Group],
    threads: usize,
    known: Vec<Measured>,
    save: &(dyn Fn(&[Measured]) -> Result<()> + Sync),
) -> Result<Vec<Measured>> {
    let mut order: Vec<(usize, usize)> = Vec::new();
    for (group, values) in known.iter().enumerate() {
        order.extend((0..values.len()).filter(|task| values[*task].is_empty()).map(|task| (group, task)));
    }
    order.sort_by_key(|&(group, _)| std::cmp::Reverse(groups[group].prompt));
    let (next, done, measured) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(known));
    let worker = || {
        // Plugins are loaded again only where counts change.
        let mut held: Option<(usize, Runner)> = None;
        while let Some(&(group, task)) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            if held.as_ref().is_none_or(|(of, _)| *of != group) {
                held = Some((group, runner(model, &groups[group])?));
            }
            let Some((_, runner)) = &mut held else { continue };
            let values = measure(runner, &groups[group].arms, &groups[group].tasks[task])?;
            let mut measured = measured.lock().unwrap_or_else(PoisonError::into_inner);
            measured[group][task] = values;
            save(&measured)?;
            eprintln!("{} of {}", done.fetch_add(1, Ordering::Relaxed) + 1, order.len());
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or(Err(Error::Thread)))
    })?;
    Ok(measured.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// A paged bf16 cache for a prompt and its compressed copy, with all arms of a group.
fn runner(model: &Arc<Model>, group: &Group) -> Result<Runner> {
    let longest = group.tasks.iter().map(|task| task.prompt.len() + task.fed.len() + ANSWER).max().unwrap_or(0);
    with_arms(model, &group.arms, longest)
}

fn with_arms(model: &Arc<Model>, arms: &[Arm], longest: usize) -> Result<Runner> {
    let kind = CacheKind::Paged { block_size: BLOCK, blocks: 2 * longest.div_ceil(BLOCK) + 16 };
    let cache = CacheConfig { kind, dtype: KvDtype::Bf16, ..CacheConfig::default() };
    let arms: Vec<_> = arms.iter().map(|arm| (arm.name.as_str(), arm.plugin, arm.config.as_str())).collect();
    model::runner(model, cache, &arms)
}

fn measure(runner: &mut Runner, arms: &[Arm], task: &Task) -> Result<Vec<Value>> {
    let (full, full_value) = observe(runner, None, task, None)?;
    let mut values = vec![full_value];
    for arm in arms {
        values.push(observe(runner, Some(arm), task, Some(&full))?.1);
    }
    Ok(values)
}

/// The logits of one arm, or of the full cache, behind the fed tokens, and what they are worth.
fn observe(
    runner: &mut Runner,
    arm: Option<&Arm>,
    task: &Task,
    full: Option<&[LogitsRow]>,
) -> Result<(Vec<LogitsRow>, Value)> {
    let id = compressed(runner, arm, &task.prompt)?;
    let rows = runner.score(id, &task.fed, Scoring::Together)?;
    let value = match &task.ask {
        Ask::Divergence => {
            let full = full.unwrap_or(&rows);
            Value { value: mean_kl(full, &rows), agreement: top1_agreement(full, &rows) }
        }
        Ask::Key(key) => {
            let words = greedy(runner, id, &rows)?;
            let found = key.found_in(&runner.model().tokenizer.decode(&words)?);
            Value { value: f64::from(u8::from(found)), agreement: 0.0 }
        }
        Ask::Copy(first, wanted) => {
            let right = rows.iter().skip(*first).zip(wanted).filter(|(row, wanted)| argmax(row) == **wanted);
            Value { value: right.count() as f64 / wanted.len().max(1) as f64, agreement: 0.0 }
        }
    };
    runner.free(id)?;
    Ok((rows, value))
}

/// Prefills a prompt, of which the rows are there already but for the first time, and has it compressed to the arm's count.
fn compressed(runner: &mut Runner, arm: Option<&Arm>, prompt: &[u32]) -> Result<SequenceId> {
    let name = arm.map_or("none", |arm| &arm.name);
    let (id, _) = runner.prefill_on(&Begin { arm: Some(name), ..Begin::new(prompt) }, CHUNK)?;
    let report = runner.report(id)?;
    let wanted = arm.map_or(prompt.len(), |arm| arm.rows);
    let wrong = report.lengths.iter().any(|rows| *rows != wanted) || !report.failures.is_empty();
    if wrong || report.next_position as usize != prompt.len() {
        let arm = arm.map_or("none", |arm| arm.title).to_owned();
        let problem = format!("{wanted} rows at position {} expected, found {report:?}", prompt.len());
        return Err(Error::Arm { arm, problem });
    }
    if arm.is_none() {
        let largest = largest(runner, id)?;
        if largest >= SHIFT {
            let problem = format!("the cache holds {largest}, linear maps are exact below {SHIFT} only");
            return Err(Error::Arm { arm: name.to_owned(), problem });
        }
    }
    Ok(id)
}

/// Largest magnitude in K and V of a sequence.
fn largest(runner: &Runner, id: SequenceId) -> Result<f32> {
    let layers = runner.sequence(id)?.layers.clone();
    let of_ranks = runner.ranks().run(move |rank| {
        let mut largest = 0.0f32;
        for (layer, held) in layers.iter().enumerate() {
            let view = rank.cache.peek(id, layer);
            let mut values = vec![0.0; held.len * view.layout.head_dim];
            for head in 0..rank.shard.kv_heads.len() {
                for buffer in [view.k, view.v] {
                    read_rows(buffer, &view.layout, &held.blocks, head, 0, &mut values);
                    largest = values.iter().fold(largest, |most, value| most.max(value.abs()));
                }
            }
        }
        largest
    })?;
    Ok(of_ranks.into_iter().fold(0.0, f32::max))
}

/// The likeliest tokens, one after the other.
fn greedy(runner: &mut Runner, id: SequenceId, rows: &[LogitsRow]) -> Result<Vec<u32>> {
    let mut words: Vec<u32> = rows.last().map(|row| argmax(row)).into_iter().collect();
    while let Some(last) = words.last().copied().filter(|_| words.len() < ANSWER) {
        words.extend(runner.score(id, &[last], Scoring::OneByOne)?.iter().map(|row| argmax(row)));
    }
    Ok(words)
}

/// That stride as a weight file is the stride of `truncate`, where both take the same rows.
///
/// # Errors
/// The engine's.
pub fn check_stride(model: &Arc<Model>, text: &Text, weights: &WeightFiles, gates: &mut Gates) -> Result<()> {
    let strides = [STRIDE, TRUNCATE_STRIDE];
    let both = |arm: &Arm| arm.factor == 2 && strides.contains(&arm.title);
    let arms: Vec<Arm> = weights.arms(CHECKED).into_iter().filter(both).collect();
    let mut runner = with_arms(model, &arms, CHECKED + CHECKED_TOKENS)?;
    let (prompt, rest) = text.tokens.split_at(CHECKED.min(text.tokens.len()));
    let fed = &rest[..CHECKED_TOKENS.min(rest.len())];
    let mut seen = Vec::new();
    for arm in &arms {
        let id = compressed(&mut runner, Some(arm), prompt)?;
        seen.push((runner.survivors(id)?, runner.score(id, fed, Scoring::Together)?));
        runner.free(id)?;
    }
    if let [(by_weights, logits), (by_truncate, expected)] = seen.as_slice() {
        let kl = mean_kl(expected, logits);
        println!(
            "stride by weights and by truncate, {CHECKED} rows, f = 2: the same positions: {}, KL {kl:.1e} {}",
            by_weights == by_truncate,
            gates.check(by_weights == by_truncate && kl < SAME)
        );
    }
    Ok(())
}
