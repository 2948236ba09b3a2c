//! Tables.

use kvhook_bench::measure::Gates;
use kvhook_bench::student::paired_one_sided;
use kvhook_engine::quality::summarise;

use crate::arms::{Arm, STRIDE, TRAINED};
use crate::tasks::{DIVERGENCE, Group};
use crate::work::Measured;

/// Largest p at which the gate holds, and the ratio to stride's KL that is aimed at.
const P: f64 = 0.01;
const TARGET: f64 = 0.75;

/// Values of an arm, task by task; 0 is the full cache.
fn column(measured: &Measured, arm: usize) -> Vec<f64> {
    measured.iter().map(|of_task| of_task[arm].value).collect()
}

/// Place of the arm with this title and factor in the columns.
fn place(group: &Group, title: &str, factor: usize) -> Option<usize> {
    group.arms.iter().position(|arm| arm.title == title && arm.factor == factor).map(|index| index + 1)
}

/// An arm against stride.
struct Compared {
    /// Mean over stride's mean.
    ratio: f64,
    /// Tasks on which it is lower.
    lower: usize,
    /// That its mean is lower.
    p: f64,
}

fn compared(values: &[f64], stride: &[f64]) -> Compared {
    Compared {
        ratio: summarise(values).mean / summarise(stride).mean,
        lower: values.iter().zip(stride).filter(|(value, stride)| value < stride).count(),
        p: paired_one_sided(values, stride),
    }
}

/// A p for a table.
fn short(p: f64) -> String {
    match p {
        p if p < 1e-6 => "< 1e-6".into(),
        p if p < 0.01 => format!("{p:.0e}"),
        p => format!("{p:.2}"),
    }
}

/// Prints a group; checks its gate.
pub fn table(group: &Group, measured: &Measured, gates: &mut Gates) {
    println!("\n{}", group.title);
    if group.measure != DIVERGENCE {
        let full = summarise(&column(measured, 0));
        println!("{:3} {:20} {:>5} {:8.3} ({:.3})", "", "full", group.prompt, full.mean, full.standard_error);
        for (index, arm) in group.arms.iter().enumerate() {
            let value = summarise(&column(measured, index + 1));
            println!(
                "f{:<2} {:20} {:5} {:8.3} ({:.3})",
                arm.factor, arm.title, arm.rows, value.mean, value.standard_error
            );
        }
        return;
    }
    println!(
        "{:3} {:20} {:>5} {:>16} {:>8} {:>7} {:>8} {:>7}",
        "", "", "rows", "KL (s.e.)", "/ stride", "lower", "p", "top-1"
    );
    for (index, arm) in group.arms.iter().enumerate() {
        let values = column(measured, index + 1);
        let summary = summarise(&values);
        let agreement: Vec<f64> = measured.iter().map(|of_task| of_task[index + 1].agreement).collect();
        let against = place(group, STRIDE, arm.factor).map(|stride| compared(&values, &column(measured, stride)));
        let against = against.filter(|_| arm.title != STRIDE).map_or_else(
            || format!("{:>8} {:>7} {:>8}", "1", "", ""),
            |Compared { ratio, lower, p }| {
                format!("{ratio:8.3} {:>7} {:>8}", format!("{lower}/{}", values.len()), short(p))
            },
        );
        println!(
            "f{:<2} {:20} {:5} {:7.4} ({:.4}) {against} {:5.1} % {}",
            arm.factor,
            arm.title,
            arm.rows,
            summary.mean,
            summary.standard_error,
            100.0 * summarise(&agreement).mean,
            verdict(group, arm, measured, gates),
        );
    }
    by_text(group, measured);
}

/// Of the trained MLP.
fn verdict(group: &Group, arm: &Arm, measured: &Measured, gates: &mut Gates) -> String {
    let places = place(group, TRAINED, arm.factor).zip(place(group, STRIDE, arm.factor));
    let Some((trained, stride)) = places.filter(|_| arm.title == TRAINED) else { return String::new() };
    let Compared { ratio, p, .. } = compared(&column(measured, trained), &column(measured, stride));
    let target = if ratio <= TARGET { "reached" } else { "missed" };
    format!("{}, target {TARGET} {target}", gates.check(ratio < 1.0 && p < P))
}

/// The trained MLP against stride in each text.
fn by_text(group: &Group, measured: &Measured) {
    let mut texts: Vec<&str> = group.tasks.iter().map(|task| task.text.as_str()).collect();
    texts.sort_unstable();
    texts.dedup();
    for text in texts {
        for factor in crate::arms::FACTORS {
            let Some(places) = place(group, TRAINED, factor).zip(place(group, STRIDE, factor)) else { continue };
            let of = |place: usize| -> Vec<f64> {
                let values = group.tasks.iter().zip(column(measured, place));
                values.filter(|(task, _)| task.text == text).map(|(_, value)| value).collect()
            };
            let (trained, stride) = (of(places.0), of(places.1));
            let Compared { ratio, lower, p } = compared(&trained, &stride);
            println!(
                "    {text}, f = {factor}: {TRAINED} / {STRIDE} {ratio:.3}, lower in {lower} of {}, p {}",
                stride.len(),
                short(p)
            );
        }
    }
}
