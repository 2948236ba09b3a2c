//! A record as one HTML page: what was found, tables of the arms, plots over time.

mod tables;
mod timeline;

use maud::{Markup, html};

use super::{counted, document, swatch};
use crate::format::moment;
use crate::record::{Arm, Findings, Record, Setting, Weight};

/// The page as text. `name` is the record's, for the heading; `against` as in [`Findings::of`].
pub fn render(record: &Record, name: &str, against: Option<&str>) -> String {
    document(
        &format!("kvhook: {name}"),
        html! {
            main {
                header {
                    h1 { "Arms of " (name) }
                    @for warning in record.warnings() { p.warning { (warning) } }
                }
                @if record.settings.is_empty() { p { "The record holds no figures and no probes." } }
                @for setting in &record.settings { (section(setting, against)) }
            }
        },
    )
}

fn section(setting: &Setting, against: Option<&str>) -> Markup {
    let findings = Findings::of(setting, against);
    html! {
        section.setting {
            h2.setting { (setting.model) " on " (setting.engine) }
            p { (introduction(setting)) }
            ul.findings {
                @for finding in &findings.sentences {
                    li class=(class(finding.weight)) { (finding.text) }
                }
            }
            (tables::arms(&findings))
            (legend(&findings.arms))
            div.figures {
                (timeline::kept(&findings, setting))
                (timeline::freed(&findings, setting))
                (timeline::hook_time(&findings, setting))
                (timeline::sequences(&findings, setting))
                (tables::divergence(&findings))
            }
        }
    }
}

fn introduction(setting: &Setting) -> String {
    let history = &setting.history;
    let mut text = match history.span() {
        Some((from, to)) if to > from => format!("Figures from {} to {}.", moment(from), moment(to)),
        Some((at, _)) => format!("Figures of {}.", moment(at)),
        None => "No figures, probes only.".into(),
    };
    if history.restarts > 0 {
        text += &format!(" Counting began anew {}; sums go on.", counted(history.restarts, "time", "times"));
    }
    text + " A difference is claimed only where its 95 % interval leaves no doubt."
}

fn class(weight: Weight) -> &'static str {
    match weight {
        Weight::Fact => "fact",
        Weight::Difference => "difference",
        Weight::Undecided => "undecided",
        Weight::Fault => "fault",
    }
}

fn legend(arms: &[Arm<'_>]) -> Markup {
    html! {
        ul.legend aria-label="Arms" {
            @for (series, arm) in arms.iter().enumerate() {
                li { (swatch(series)) (arm.name) }
            }
        }
    }
}
