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
mod file;
mod instances;
mod plans;
mod schema;
mod strange;
mod subject;
mod threads;

use crate::fault::Fault;

pub use file::File;
pub use subject::Subject;

/// One rule.
pub struct Rule {
    /// Never used for another rule.
    pub number: u32,
    /// In kebab-case.
    pub name: &'static str,
    /// The rule in one sentence.
    pub says: &'static str,
    check: Check,
}

/// How a rule is checked.
enum Check {
    /// It holds or it does not.
    Plain(fn(&Subject) -> Result<(), Fault>),
    /// The same, and there is something to tell of it.
    Telling(fn(&Subject) -> Result<String, Fault>),
}

impl Rule {
    /// Runs the check; gives what there is to tell where it holds, such as times, or parts that do not apply.
    ///
    /// # Errors
    /// What the plugin did instead, as a [`Fault`].
    pub fn check(&self, subject: &Subject) -> Result<String, Fault> {
        match self.check {
            Check::Plain(check) => check(subject).map(|()| String::new()),
            Check::Telling(check) => check(subject),
        }
    }

    /// A rule by its name.
    pub fn named(name: &str) -> Option<&'static Self> {
        RULES.iter().find(|rule| rule.name == name)
    }
}

/// All rules, by number.
pub const RULES: &[Rule] = &[
    Rule {
        number: 1,
        name: "entry-is-whole",
        says: "The entry says its size, ABI major 1, an id, a version and its layouts, and has all four functions.",
        check: Check::Plain(boundary::entry_is_whole),
    },
    Rule {
        number: 2,
        name: "unknown-ids-are-null",
        says: "`hook` answers null to every id that it does not implement, and the same table each time to one it does.",
        check: Check::Plain(boundary::unknown_ids_are_null),
    },
    Rule {
        number: 3,
        name: "null-arguments-are-refused",
        says: "A null instance, argument or output is answered with an error, with or without room for its text.",
        check: Check::Plain(boundary::null_arguments_are_refused),
    },
    Rule {
        number: 4,
        name: "short-structs-are-refused",
        says: "A struct that says it is smaller than its first version is answered with an error.",
        check: Check::Plain(boundary::short_structs_are_refused),
    },
    Rule {
        number: 5,
        name: "larger-structs-are-taken",
        says: "Structs and strides of a newer host give the same plans, and nothing is written behind the known part.",
        check: Check::Plain(plans::larger_structs_are_taken),
    },
    Rule {
        number: 6,
        name: "bad-configs-are-refused",
        says: "Any config gives an instance or an error with a text, within a second, and an instance only on success.",
        check: Check::Plain(configs::bad_configs_are_refused),
    },
    Rule {
        number: 7,
        name: "needs-are-known",
        says: "`needs` succeeds, names known needs and phases only, and answers the same for the same config.",
        check: Check::Plain(instances::needs_are_known),
    },
    Rule {
        number: 8,
        name: "instances-leave-nothing",
        says: "1,000 instances made and destroyed leave no memory, no thread and no open file.",
        check: Check::Plain(instances::leave_nothing),
    },
    Rule {
        number: 9,
        name: "instances-are-independent",
        says: "Instances side by side, on several threads, plan what each plans alone.",
        check: Check::Plain(instances::are_independent),
    },
    Rule {
        number: 10,
        name: "plans-keep-the-bound",
        says: "At every length a plan keeps what `bound` said, its rows ascend and exist, and nothing that was not lent is written.",
        check: Check::Plain(plans::keep_the_bound),
    },
    Rule {
        number: 11,
        name: "every-dtype-and-layout",
        says: "f32, f16 and bf16, contiguous and paged: a plan, or a refusal that says so; never another plan by layout.",
        check: Check::Telling(plans::every_dtype_and_layout),
    },
    Rule {
        number: 12,
        name: "same-in-same-out",
        says: "The same bytes give the same plan: again, in a batch, under another uid, in another instance.",
        check: Check::Plain(plans::same_in_same_out),
    },
    Rule {
        number: 13,
        name: "refused-memory-is-survived",
        says: "Refused memory gives a keep or an error, and the next call works.",
        check: Check::Plain(plans::refused_memory_is_survived),
    },
    Rule {
        number: 14,
        name: "values-that-are-no-numbers",
        says: "NaN and infinity in a cache give a plan, a keep or an error, and do not change another sequence's plan.",
        check: Check::Plain(plans::values_that_are_no_numbers),
    },
    Rule {
        number: 15,
        name: "freed-is-forgotten",
        says: "`on_free` takes any uid, for any reason, from any thread; after it nothing of the sequence is left.",
        check: Check::Plain(instances::freed_is_forgotten),
    },
    Rule {
        number: 16,
        name: "calls-are-quick",
        says: "Loading takes less than five seconds, an instance one, a plan for 4,096 rows of one layer five.",
        check: Check::Telling(instances::calls_are_quick),
    },
    Rule {
        number: 17,
        name: "metadata-is-true",
        says: "What the file says without running is what the running entry says; an instance needs nothing else.",
        check: Check::Plain(file::metadata_is_true),
    },
    Rule {
        number: 18,
        name: "configs-keep-the-schema",
        says: "Values that the schema allows give an instance, or an error that names the key; others give that error.",
        check: Check::Telling(schema::configs_keep_the_schema),
    },
    Rule {
        number: 19,
        name: "grown-keeps-the-rules",
        says: "After a commit, `on_grown` keeps its bound, again and again, and the same story gives the same plans.",
        check: Check::Telling(plans::grown_keeps_the_rules),
    },
    Rule {
        number: 20,
        name: "any-thread-may-call",
        says: "Calls come from any thread, one after the other; `hook` from several at once.",
        check: Check::Plain(threads::any_thread_may_call),
    },
    Rule {
        number: 21,
        name: "strange-arguments-are-survived",
        says: "Models, layers, lengths and segments that no good engine has give a plan or an error, never a panic.",
        check: Check::Plain(strange::strange_arguments_are_survived),
    },
    Rule {
        number: 22,
        name: "imports-no-synchronisation",
        says: "The file takes no function of CUDA that waits or makes a stream from a library.",
        check: Check::Plain(file::imports_no_synchronisation),
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
