//! Records of an engine that serves: what its arms did, and how probes fared. `docs/report.md` has the format.
//!
//! [`read`] takes lines from a stranger: whatever is wrong with one is told with its number, and the others count.

mod findings;
mod history;
mod line;
mod probes;
mod read;
mod write;

pub(crate) use findings::share;
pub use findings::{Arm, Finding, Findings, Weight};
pub use history::{ArmHistory, Counts, History, Period};
pub use line::{FORMAT, MAX_LINE, MAX_NAME};
pub use probes::{ArmProbes, Probe, Probes};
pub use read::read;
pub use write::{figures_line, probe_line};

/// Everything that a record tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// A part for each engine and model, in the order in which they come.
    pub settings: Vec<Setting>,
    /// Lines that were passed over, the first [`Record::MOST_PROBLEMS`] of them.
    pub problems: Vec<Problem>,
    /// Number of lines that were passed over.
    pub passed_over: usize,
    /// Lines that are not empty.
    pub lines: usize,
    /// Lines of kinds that this version does not know.
    pub other_kinds: usize,
    /// Whether the last line ends in the middle.
    pub cut_off: bool,
}

impl Record {
    /// The most problems that are kept.
    pub const MOST_PROBLEMS: usize = 20;

    /// What a reader should know of lines that do not count, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = self.problems.iter().map(|p| format!("line {}: {}", p.line, p.what)).collect();
        if self.passed_over > self.problems.len() {
            warnings.push(format!("{} more lines were passed over", self.passed_over - self.problems.len()));
        }
        if self.cut_off {
            warnings
                .push("the last line is cut off and does not count: it was being written, or its writer died".into());
        }
        if self.other_kinds > 0 {
            warnings.push(format!("{} lines are of kinds that this version does not know", self.other_kinds));
        }
        let unpaired: usize = self.settings.iter().map(|setting| setting.probes.unpaired).sum();
        if unpaired > 0 {
            warnings.push(format!("{unpaired} probes have no line of the arm `none` above them, and do not count"));
        }
        warnings
    }
}

/// One engine with one model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Setting {
    /// Name of the engine.
    pub engine: String,
    /// Name of the model.
    pub model: String,
    /// What the arms did.
    pub history: History,
    /// How probes fared.
    pub probes: Probes,
}

impl Setting {
    /// Whether an arm of this name served or was probed.
    pub fn has_arm(&self, name: &str) -> bool {
        self.history.arms.iter().any(|arm| arm.name == name) || self.probes.arm(name).is_some()
    }
}

/// A line that does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Its number, from 1.
    pub line: usize,
    /// What was found, and what was expected.
    pub what: String,
}
