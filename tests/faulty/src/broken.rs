//! A way to break each conformance rule.

/// A variant of the plugin that breaks a rule.
#[derive(Debug, Clone, Copy)]
pub struct Broken {
    /// The rule's name.
    pub rule: &'static str,
    /// The file's word: one of [`variant::WORDS`](crate::variant::WORDS).
    pub word: &'static str,
    /// The config.
    pub config: &'static str,
    /// What is said about it, in part.
    pub said: &'static str,
    /// Whether it takes the process that it runs in along.
    pub ends_process: bool,
}

const fn case(rule: &'static str, word: &'static str, config: &'static str, said: &'static str) -> Broken {
    Broken { rule, word, config, said, ends_process: false }
}

const fn ends(rule: &'static str, config: &'static str, said: &'static str) -> Broken {
    Broken { rule, word: "good", config, said, ends_process: true }
}

/// At least one for each rule that is not about the file alone.
pub const BROKEN: &[Broken] = &[
    case("entry-is-whole", "null-destroy", "", "`destroy`"),
    case("entry-is-whole", "major", "", "2"),
    case("entry-is-whole", "no-id", "", "`id` is empty"),
    case("unknown-ids-are-null", "any-table", "", "for the empty id"),
    case("null-arguments-are-refused", "needs-null", "", "takes a null instance"),
    case("short-structs-are-refused", "needs-short", "", "structs of 8 bytes"),
    case("larger-structs-are-taken", "good", "damage=write-tail", "behind the struct"),
    case("bad-configs-are-refused", "any-config", "", "is taken"),
    case("needs-are-known", "good", "must=1099511627776", "unknown bits"),
    case("needs-are-known", "good", "phases=1", "does not need `queries`"),
    case("needs-are-known", "good", "phases=4,must=1", "unknown phases"),
    case("instances-leave-nothing", "leak", "", "KiB of memory"),
    case("instances-are-independent", "good", "breaks=independence", "something else than alone"),
    case("plans-keep-the-bound", "good", "breaks=bound", "two bounds"),
    case("plans-keep-the-bound", "good", "damage=write-cache", "never writes into the cache"),
    case("plans-keep-the-bound", "good", "damage=write-memory", "outside its"),
    case("plans-keep-the-bound", "good", "damage=too-many", "its bound is"),
    case("plans-keep-the-bound", "good", "damage=descending", "do not ascend"),
    case("every-dtype-and-layout", "good", "breaks=layout", "another plan for f32 as TokenMajor"),
    case("same-in-same-out", "good", "breaks=uid", "as sequence 9000000001"),
    case("same-in-same-out", "good", "prefill_done=panic,after=3", "on_prefill_done goes wrong"),
    case("refused-memory-is-survived", "good", "breaks=memory", "the plugin panicked: no memory"),
    case("values-that-are-no-numbers", "good", "breaks=numbers", "a key that is no number"),
    case("freed-is-forgotten", "good", "breaks=free", "a freed sequence"),
    case("freed-is-forgotten", "good", "free=fail", "on_free goes wrong"),
    case("calls-are-quick", "good", "breaks=time", "an instance took "),
    case("grown-keeps-the-rules", "good", "every=40,must=128,grown=fail", "on_grown goes wrong"),
    case("grown-keeps-the-rules", "no-hooks", "every=40,must=128", "does not implement"),
    case("any-thread-may-call", "good", "breaks=thread", "on another thread"),
    case("strange-arguments-are-survived", "good", "breaks=strange", "a name that cannot be"),
    ends("plans-keep-the-bound", "breaks=crash", "signal 11 (SIGSEGV"),
    ends("plans-keep-the-bound", "breaks=hang", "no answer within"),
    ends("plans-keep-the-bound", "breaks=exit", "exit code 0 and without an answer"),
];
