//! Numbered rules that every plugin keeps, each with a check on the mock engine (`docs/conformance.md` says why and who
//! is hurt by breaking one).
//!
//! A check runs the plugin in this process: what a broken one does to it (a crash, an endless loop) is for the caller to
//! keep apart, as `kvhook validate` does with a process and a time limit for each rule.
//!
//! ```ignore
//! let subject = Subject::new(kvhook_testing::entry!(my_plugin), "keep=0.25");
//! for rule in RULES {
//!     rule.check(&subject).unwrap();
//! }
//! ```

mod boundary;
mod configs;
mod instances;
mod plans;
mod subject;

use crate::fault::Fault;

pub use subject::Subject;

/// One rule.
pub struct Rule {
    /// Never used for another rule.
    pub number: u32,
    /// In kebab-case.
    pub name: &'static str,
    /// The rule in one sentence.
    pub says: &'static str,
    check: fn(&Subject) -> Result<(), Fault>,
}

impl Rule {
    /// Runs the check. A caught panic of the mock's own is not expected.
    ///
    /// # Errors
    /// What the plugin did instead, as a [`Fault`].
    pub fn check(&self, subject: &Subject) -> Result<(), Fault> {
        (self.check)(subject)
    }
}

/// All rules, by number.
pub const RULES: &[Rule] = &[
    Rule {
        number: 1,
        name: "entry-is-whole",
        says: "The entry says its size, ABI major 1, an id, a version and its layouts, and has all four functions.",
        check: boundary::entry_is_whole,
    },
    Rule {
        number: 2,
        name: "unknown-ids-are-null",
        says: "`hook` answers null to every id that it does not implement, and the same table each time to one it does.",
        check: boundary::unknown_ids_are_null,
    },
    Rule {
        number: 3,
        name: "null-arguments-are-refused",
        says: "A null instance, argument or output is answered with an error, with or without room for its text.",
        check: boundary::null_arguments_are_refused,
    },
    Rule {
        number: 4,
        name: "short-structs-are-refused",
        says: "A struct that says it is smaller than its first version is answered with an error.",
        check: boundary::short_structs_are_refused,
    },
    Rule {
        number: 5,
        name: "larger-structs-are-taken",
        says: "Structs and strides of a newer host give the same plans, and nothing is written behind the known part.",
        check: plans::larger_structs_are_taken,
    },
    Rule {
        number: 6,
        name: "bad-configs-are-refused",
        says: "Any config gives an instance or an error with a text, within a second, and an instance only on success.",
        check: configs::bad_configs_are_refused,
    },
    Rule {
        number: 7,
        name: "needs-are-known",
        says: "`needs` succeeds, names known needs and phases only, and answers the same for the same config.",
        check: instances::needs_are_known,
    },
    Rule {
        number: 8,
        name: "instances-leave-nothing",
        says: "1,000 instances made and destroyed leave no memory, no thread and no open file.",
        check: instances::leave_nothing,
    },
    Rule {
        number: 9,
        name: "instances-are-independent",
        says: "Instances side by side, on several threads, plan what each plans alone.",
        check: instances::are_independent,
    },
    Rule {
        number: 10,
        name: "plans-keep-the-bound",
        says: "At every length a plan keeps what `bound` said, its rows ascend and exist, and the cache is not written.",
        check: plans::keep_the_bound,
    },
    Rule {
        number: 11,
        name: "every-dtype-and-layout",
        says: "f32, f16 and bf16, contiguous and paged: a plan, or a refusal that says so; never another plan by layout.",
        check: plans::every_dtype_and_layout,
    },
    Rule {
        number: 12,
        name: "same-in-same-out",
        says: "The same bytes give the same plan: again, in a batch, under another uid, in another instance.",
        check: plans::same_in_same_out,
    },
    Rule {
        number: 13,
        name: "refused-memory-is-survived",
        says: "Refused memory gives a keep or an error, and the next call works.",
        check: plans::refused_memory_is_survived,
    },
    Rule {
        number: 14,
        name: "values-that-are-no-numbers",
        says: "NaN and infinity in a cache give a plan, a keep or an error, and do not change another sequence's plan.",
        check: plans::values_that_are_no_numbers,
    },
    Rule {
        number: 15,
        name: "freed-is-forgotten",
        says: "`on_free` takes any uid, for any reason, from any thread; after it nothing of the sequence is left.",
        check: instances::freed_is_forgotten,
    },
    Rule {
        number: 16,
        name: "calls-are-quick",
        says: "An instance is made within a second, and a plan for 4,096 rows of one layer within five.",
        check: instances::calls_are_quick,
    },
];

/// A broken rule, in words.
fn broken<T>(what: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Broken { what: what.into() })
}

/// A broken rule where a condition does not hold.
fn holds(condition: bool, what: impl FnOnce() -> String) -> Result<(), Fault> {
    if condition { Ok(()) } else { broken(what()) }
}
