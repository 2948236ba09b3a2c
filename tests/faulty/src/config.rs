//! What the plugin does wrong, and the good it does around it.

use crate::breaks::Breaks;

kvhook_abi::words! {
    /// How a function fails.
    pub enum Fault {
        /// It does not.
        None = "none",
        /// It returns an error.
        Fail = "fail",
        /// It panics.
        Panic = "panic",
        /// It panics, and dropping the panic's payload panics again.
        PanicTwice = "panic-twice",
        /// It says that the model is not supported.
        Unsupported = "unsupported",
        /// It says that memory was refused.
        OutOfMemory = "out-of-memory",
    }
}

kvhook_abi::words! {
    /// What `bound` answers.
    pub enum BoundAnswer {
        /// The fraction `keep` of each layer's rows, at least one.
        Good = "good",
        /// One row more than there are.
        Above = "above",
        /// No rows at all.
        Zero = "zero",
        /// As many as there are.
        All = "all",
        /// Keep, because the sequence is too short.
        TooShort = "too-short",
        /// One row more for each layer, so that counts differ.
        Unequal = "unequal",
    }
}

kvhook_abi::words! {
    /// What kind of plan is made, before it is damaged.
    pub enum PlanKind {
        /// A select by indices that heads share.
        Select = "select",
        /// A select by indices of each head.
        SelectHeads = "select-heads",
        /// A select by two ranges: the first rows and the last.
        Ranges = "ranges",
        /// A rewrite with copies of the rows that `select` would keep.
        Rewrite = "rewrite",
        /// A keep.
        Keep = "keep",
    }
}

kvhook_abi::words! {
    /// What is wrong with the plan.
    pub enum Damage {
        /// Nothing.
        None = "none",
        /// The last index or range reaches beyond the rows.
        OutOfRange = "out-of-range",
        /// The last index is -1, as an unsigned number.
        Negative = "negative",
        /// Two neighbours are exchanged: indices, ranges or positions.
        Descending = "descending",
        /// The last index, range or position stands twice.
        Repeated = "repeated",
        /// One row more than the bound.
        TooMany = "too-many",
        /// No rows.
        NoRows = "no-rows",
        /// One row fewer than the bound.
        Fewer = "fewer",
        /// Neither indices, ranges nor positions.
        NullArray = "null-array",
        /// Indices and ranges at once.
        Both = "both",
        /// A kind of plan that does not exist.
        UnknownKind = "unknown-kind",
        /// The ranges' lengths do not add up to the count.
        Sum = "sum",
        /// A position that no token has yet.
        Position = "position",
        /// A rewrite without lent rows.
        NotLent = "not-lent",
        /// The next position moves though that was not needed.
        Moved = "moved",
        /// A key in the cache is written.
        WriteCache = "write-cache",
        /// An index is written behind the memory that was asked for.
        WriteMemory = "write-memory",
        /// Bytes are written behind the struct that the plugin knows, where the host's is larger.
        WriteTail = "write-tail",
        /// The host's `struct_size` is changed.
        StructSize = "struct-size",
    }
}

kvhook_abi::config! {
    /// Config of `faulty`.
    pub struct Config {
        /// How create fails.
        create: Fault = "none";
        /// How needs fails.
        needs: Fault = "none";
        /// How bound fails.
        bound: Fault = "none";
        /// How on_prefill_done fails.
        prefill_done: Fault = "none";
        /// How on_grown fails.
        grown: Fault = "none";
        /// How before_attention fails.
        before_attention: Fault = "none";
        /// How on_free fails.
        free: Fault = "none";
        /// How destroy fails; an error cannot be returned there.
        destroy: Fault = "none";
        /// Calls of a hook that go well before it fails, or before its plan is damaged.
        after: u64 = 0;
        /// Misbehave on this rank only.
        rank: Option<u32> = null;
        /// What bound answers.
        answer: BoundAnswer = "good";
        /// Fraction of the rows that is kept.
        keep: f64 = 0.5, in 0.0..=1.0;
        /// The plan that is made.
        plan: PlanKind = "select";
        /// What is wrong with it.
        damage: Damage = "none";
        /// Which rule it breaks beside.
        breaks: Breaks = "nothing";
        /// Damage this layer only.
        layer: Option<u32> = null;
        /// Bytes to ask for in each kind of memory at each hook; 0: nothing is asked for.
        allocate: u64 = 0;
        /// KVH_CAN bits that it says it must have.
        must: u64 = 0;
        /// Phases in which before_attention is called: 1 prefill, 2 decode, 3 both.
        phases: u32 = 0;
        /// Queries of the prompt that it wants.
        window: u32 = 0;
        /// Tokens between two calls of on_grown.
        every: u64 = 0;
        /// Sequences shorter than this are not shown.
        min_tokens: u64 = 0;
    }
}
