//! The JSON file: every value, and where an interrupted run goes on.

use std::path::Path;

use kvhook_bench::passages::Text;
use kvhook_bench::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::arms::Arm;
use crate::tasks::Group;
use crate::work::{Measured, Value};

#[derive(Serialize, Deserialize)]
struct File {
    texts: Vec<TextEntry>,
    groups: Vec<GroupEntry>,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct TextEntry {
    name: String,
    tokens: usize,
}

#[derive(Serialize, Deserialize)]
struct GroupEntry {
    measure: String,
    prompt: usize,
    /// The first is the full cache.
    arms: Vec<ArmEntry>,
    tasks: Vec<TaskEntry>,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct ArmEntry {
    arm: String,
    factor: usize,
    rows: usize,
}

#[derive(Serialize, Deserialize)]
struct TaskEntry {
    text: String,
    start: usize,
    /// Of each arm.
    values: Vec<Value>,
}

fn texts_of(texts: &[Text]) -> Vec<TextEntry> {
    texts.iter().map(|text| TextEntry { name: text.name.clone(), tokens: text.tokens.len() }).collect()
}

fn arms_of(group: &Group) -> Vec<ArmEntry> {
    let full = ArmEntry { arm: "full".into(), factor: 1, rows: group.rows() };
    let entry = |arm: &Arm| ArmEntry { arm: arm.title.into(), factor: arm.factor, rows: arm.rows };
    std::iter::once(full).chain(group.arms.iter().map(entry)).collect()
}

/// Writes every value that there is.
///
/// # Errors
/// [`Error::Json`], [`Error::File`].
pub fn write(path: &Path, texts: &[Text], groups: &[Group], measured: &[Measured]) -> Result<()> {
    let entry = |(group, measured): (&Group, &Measured)| {
        let done = group.tasks.iter().zip(measured).filter(|(_, values)| !values.is_empty());
        let task = |(task, values): (&crate::tasks::Task, &Vec<Value>)| TaskEntry {
            text: task.text.clone(),
            start: task.start,
            values: values.clone(),
        };
        let (measure, prompt) = (group.measure.to_owned(), group.prompt);
        GroupEntry { measure, prompt, arms: arms_of(group), tasks: done.map(task).collect() }
    };
    let file = File { texts: texts_of(texts), groups: groups.iter().zip(measured).map(entry).collect() };
    let text = serde_json::to_string(&file)?;
    std::fs::write(path, text + "\n").map_err(|source| Error::File { path: path.into(), source })
}

/// For each group and task the values of an earlier run on the same texts, none where that has none. It is for the one
/// who runs it to know that plugins and weights are the same.
///
/// # Errors
/// [`Error::Json`], [`Error::File`].
pub fn read(path: &Path, texts: &[Text], groups: &[Group]) -> Result<Vec<Measured>> {
    let mut known: Vec<Measured> = groups.iter().map(|group| vec![Vec::new(); group.tasks.len()]).collect();
    let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
    let file: File = serde_json::from_str(&text)?;
    if file.texts != texts_of(texts) {
        return Ok(known);
    }
    for (group, known) in groups.iter().zip(&mut known) {
        let same = |entry: &&GroupEntry| {
            entry.measure == group.measure && entry.prompt == group.prompt && entry.arms == arms_of(group)
        };
        for entry in file.groups.iter().filter(same).flat_map(|entry| &entry.tasks) {
            let tasks = group.tasks.iter().zip(known.iter_mut());
            for (_, values) in tasks.filter(|(task, _)| task.text == entry.text && task.start == entry.start) {
                values.clone_from(&entry.values);
            }
        }
    }
    Ok(known)
}
