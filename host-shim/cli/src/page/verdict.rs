//! What is to be made of an evaluation.

use maud::{Markup, html};

use crate::eval::{Evaluation, Verdict};

/// Problems first, then the conclusion, then what it rests on.
pub fn section(evaluation: &Evaluation) -> Markup {
    html! {
        @for problem in &evaluation.problems { p.warning { (problem) } }
        p.lead { (evaluation.conclusion) }
        ul.findings {
            @for against in &evaluation.against {
                li class=(class(against.verdict)) { (against.sentence) }
            }
            @for cost in &evaluation.costs { li { (cost) } }
        }
    }
}

fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "better",
        Verdict::Worse => "worse",
        Verdict::Undecided => "undecided",
    }
}
