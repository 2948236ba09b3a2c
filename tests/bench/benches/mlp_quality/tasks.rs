//! What is measured: passages, prompts with a passkey, lists to be copied.

use kvhook_bench::passages::{Text, spread};
use kvhook_bench::{Error, Result};
use kvhook_engine::model::Tokenizer;
use kvhook_engine::quality::Passkey;

use crate::Args;
use crate::arms::{Arm, WeightFiles};

/// What is measured; the gate is about the first.
pub const DIVERGENCE: &str = "KL to the full cache, nats a token";
const KEYS: &str = "keys found";
const COPIES: &str = "tokens copied";

/// Scored tokens of a passage.
const SCORED: usize = 256;
/// Tokens of a prompt with a passkey, and where in it the key is.
const PASSKEY_LENGTH: usize = 1024;
const DEPTHS: [f64; 6] = [0.08, 0.25, 0.42, 0.58, 0.75, 0.92];
/// Tokens of a list, and those of them that are scored: from the first that can be known on.
const LIST: usize = 320;
const COPIED: std::ops::Range<usize> = 8..200;

/// A prompt that is compressed, and what comes then.
pub struct Task {
    /// Where it comes from.
    pub text: String,
    /// First token in that text.
    pub start: usize,
    /// All of it is in the cache when it is compressed.
    pub prompt: Vec<u32>,
    /// Fed after that.
    pub fed: Vec<u32>,
    pub ask: Ask,
}

/// What is wanted of the logits behind the fed tokens.
pub enum Ask {
    /// Their divergence from those of the full cache.
    Divergence,
    /// Whether the key comes out.
    Key(Passkey),
    /// How many of them have these tokens on top; the first row and its tokens.
    Copy(usize, Vec<u32>),
}

/// Tasks of one kind and length, with the arms that run on them.
pub struct Group {
    pub title: String,
    /// What its values are.
    pub measure: &'static str,
    /// T, or the prompt's rows.
    pub prompt: usize,
    pub arms: Vec<Arm>,
    pub tasks: Vec<Task>,
}

impl Group {
    /// Rows of the full cache.
    pub fn rows(&self) -> usize {
        self.tasks.first().map_or(0, |task| task.prompt.len())
    }
}

/// Everything that is to be measured.
///
/// # Errors
/// [`Error::ShortText`], and the tokenizer's.
pub fn groups(args: &Args, tokenizer: &Tokenizer, texts: &[Text], weights: &WeightFiles) -> Result<Vec<Group>> {
    let mut groups = Vec::new();
    for &prompt in &args.prompts {
        groups.push(passages(args.passages, prompt, texts, weights)?);
    }
    if args.passkeys > 0 {
        groups.push(passkeys(args.passkeys, tokenizer, texts, weights)?);
    }
    if args.copies > 0 {
        groups.push(copies(args.copies, tokenizer, texts, weights)?);
    }
    Ok(groups)
}

fn passages(wanted: usize, prompt: usize, texts: &[Text], weights: &WeightFiles) -> Result<Group> {
    let (mut tasks, mut disjoint) = (Vec::new(), true);
    for (index, text) in texts.iter().enumerate() {
        let wanted = (wanted + texts.len() - 1 - index) / texts.len();
        let found = text.tokens.len();
        let short = || Error::ShortText { text: text.name.clone(), found, wanted, prompt, scored: SCORED };
        let (starts, whole) = spread(found, prompt, SCORED, wanted).ok_or_else(short)?;
        disjoint &= whole;
        tasks.extend(starts.into_iter().enumerate().map(|(number, start)| {
            // The last token of the prompt is the first that is fed, so that all logits come from the compressed cache.
            let (cached, rest) = text.tokens[start..start + prompt - 1 + SCORED].split_at(prompt - 1);
            let (prompt, fed) = (cached.to_vec(), rest.to_vec());
            (number, Task { text: text.name.clone(), start, prompt, fed, ask: Ask::Divergence })
        }));
    }
    // Texts in turn, so that the first ones are a fair part.
    tasks.sort_by_key(|(number, _)| *number);
    let tasks: Vec<Task> = tasks.into_iter().map(|(_, task)| task).collect();
    let apart = if disjoint { "whole passages disjoint" } else { "scored tokens disjoint, prompts overlap" };
    let title = format!("T = {prompt}, {} passages of {} texts, {apart}", tasks.len(), texts.len());
    Ok(Group { title, measure: DIVERGENCE, prompt, arms: weights.arms(prompt - 1), tasks })
}

fn passkeys(count: usize, tokenizer: &Tokenizer, texts: &[Text], weights: &WeightFiles) -> Result<Group> {
    let task = |index: usize| {
        let text = &texts[index / DEPTHS.len() % texts.len()];
        let start = index * PASSKEY_LENGTH % text.tokens.len().saturating_sub(PASSKEY_LENGTH).max(1);
        let filler = tokenizer.decode(&text.tokens[start..text.tokens.len().min(start + PASSKEY_LENGTH)])?;
        // Knuth's multiplicative hash: five digits that differ from task to task.
        let key = 10_000 + ((index as u64 + 1) * 2_654_435_761 % 90_000) as u32;
        let key = Passkey::new(tokenizer, &filler, key, DEPTHS[index % DEPTHS.len()], PASSKEY_LENGTH)?;
        let (prompt, fed) = (key.prompt.clone(), key.question.clone());
        Ok(Task { text: text.name.clone(), start, prompt, fed, ask: Ask::Key(key) })
    };
    let tasks = (0..count).map(task).collect::<Result<Vec<_>>>()?;
    let title = format!("Passkeys, {PASSKEY_LENGTH} tokens, {} depths, {count} keys: found", DEPTHS.len());
    Ok(Group { title, measure: KEYS, prompt: PASSKEY_LENGTH, arms: weights.arms(PASSKEY_LENGTH), tasks })
}

fn copies(count: usize, tokenizer: &Tokenizer, texts: &[Text], weights: &WeightFiles) -> Result<Group> {
    let (head, tail) = (tokenizer.encode("List:")?, tokenizer.encode("\n\nRepeat the list. List:")?);
    let task = |index: usize| {
        let text = &texts[index % texts.len()];
        let mut list = tokenizer.encode_text(&random_words(&text.content, index as u64))?;
        list.truncate(LIST);
        let mut prompt = [head.as_slice(), &list, &tail].concat();
        let last = prompt.split_off(prompt.len().saturating_sub(1));
        let fed = [last.as_slice(), &list[..COPIED.end.min(list.len()) - 1]].concat();
        let wanted = list[COPIED.start..COPIED.end.min(list.len())].to_vec();
        Ok(Task { text: text.name.clone(), start: index, prompt, fed, ask: Ask::Copy(COPIED.start, wanted) })
    };
    let tasks = (0..count).map(task).collect::<Result<Vec<_>>>()?;
    let rows = tasks.first().map_or(0, |task| task.prompt.len());
    let title = format!("Copy, {count} lists of {LIST} tokens of random words: right tokens of {}", COPIED.len());
    Ok(Group { title, measure: COPIES, prompt: rows, arms: weights.arms(rows), tasks })
}

/// Words of a text, drawn at random: no sense in them helps to guess the next.
fn random_words(text: &str, seed: u64) -> String {
    let plain = |word: &&str| (4..=8).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_lowercase());
    let words: Vec<&str> = text.split_whitespace().filter(plain).collect();
    let words: Vec<&str> = std::collections::BTreeSet::from_iter(words).into_iter().collect();
    // Weyl's sequence through a multiplicative hash (splitmix64's).
    let mut state = seed.wrapping_mul(0xd1b5_4a32_d192_ed03);
    let mut draw = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) as usize % words.len().max(1)
    };
    (0..LIST).filter_map(|_| words.get(draw()).map(|word| format!(" {word}"))).collect()
}
