//! What an engine offers, what an instance needs, and the small enums around them.

use crate::raw::*;

/// Defines a set of bits with names.
macro_rules! bits {
    ($(#[$doc:meta])* $set:ident($raw:ty) { $($(#[$item_doc:meta])* $name:ident = $bit:expr, $text:literal;)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $set(pub $raw);

        impl $set {
            /// The empty set.
            pub const NONE: Self = Self(0);
            $($(#[$item_doc])* pub const $name: Self = Self($bit);)+

            /// Every bit with its name.
            pub const NAMES: &'static [(Self, &'static str)] = &[$((Self::$name, $text)),+];

            /// All bits of both sets.
            pub const fn and(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// Whether all bits of `other` are in this set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The bits of this set that are not in `other`.
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// Whether the set is empty.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// Names of the bits, separated by commas; unknown bits as a number.
            pub fn names(self) -> String {
                let mut names: Vec<String> =
                    Self::NAMES.iter().filter(|(bit, _)| self.contains(*bit)).map(|(_, name)| (*name).to_owned()).collect();
                let known = Self::NAMES.iter().fold(Self::NONE, |all, (bit, _)| all.and(*bit));
                let unknown = self.without(known);
                if !unknown.is_empty() {
                    names.push(format!("unknown bits {:#x}", unknown.0));
                }
                names.join(", ")
            }
        }
    };
}

bits! {
    /// What an engine can do: `KVH_CAN_*`.
    Can(u64) {
        /// It calls `before_attention`.
        QUERIES = KVH_CAN_QUERIES, "queries";
        /// It can show every query of a prompt.
        ALL_QUERIES = KVH_CAN_ALL_QUERIES, "all_queries";
        /// Lengths may differ between layers.
        LAYER_COUNTS = KVH_CAN_LAYER_COUNTS, "layer_counts";
        /// Counts may depend on the data.
        DATA_COUNTS = KVH_CAN_DATA_COUNTS, "data_counts";
        /// A plugin may keep state for a sequence.
        STATE = KVH_CAN_STATE, "state";
        /// The host lends rows for a rewrite.
        REWRITE = KVH_CAN_REWRITE, "rewrite";
        /// The next token's position may change at commit.
        MOVE_POSITIONS = KVH_CAN_MOVE_POSITIONS, "move_positions";
        /// It calls `on_grown`.
        GROWN = KVH_CAN_GROWN, "grown";
    }
}

bits! {
    /// Phases in which `before_attention` is called: `KVH_PHASE_*`.
    Phases(u32) {
        /// The tokens of a prompt.
        PREFILL = KVH_PHASE_PREFILL, "prefill";
        /// One token for each sequence.
        DECODE = KVH_PHASE_DECODE, "decode";
    }
}

bits! {
    /// The hook points that a plugin implements.
    Hooks(u32) {
        /// `kvh.on_prefill_done/1`
        ON_PREFILL_DONE = 1, "kvh.on_prefill_done/1";
        /// `kvh.on_grown/1`
        ON_GROWN = 2, "kvh.on_grown/1";
        /// `kvh.before_attention/1`
        BEFORE_ATTENTION = 4, "kvh.before_attention/1";
        /// `kvh.on_free/1`
        ON_FREE = 8, "kvh.on_free/1";
    }
}

/// What the engine offers to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offers {
    /// What it can do.
    pub can: Can,
    /// Most queries of a prompt's end that it can show.
    pub max_window_queries: u32,
    /// Tokens of a block; 0: contiguous.
    pub block_size: u32,
}

/// What an instance needs, with its config and this model. A need that is not offered is an error at load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// What must be offered.
    pub must: Can,
    /// Phases in which `before_attention` is called; none: never.
    pub before_attention: Phases,
    /// Layers for which `before_attention` is called; `None`: all.
    pub layers: Option<Vec<bool>>,
    /// How many of a prompt's last queries it wants; `u32::MAX`: all.
    pub window_queries: u32,
    /// Call `on_grown` each time a sequence has grown by so many tokens; 0: never.
    pub grown_every: u64,
    /// Sequences shorter than this are not shown; 0: all are.
    pub min_tokens: u64,
}

/// Why a sequence is kept as it is: `KVH_REASON_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reason {
    /// The plugin chose so.
    #[default]
    None,
    /// The sequence is too short for this config.
    TooShort,
    /// Compressing would free nothing.
    NoGain,
    /// Too few queries of the prompt were seen.
    QueriesMissing,
    /// No rows were to be had.
    NoRoom,
    /// The layout, dtype or layer kind is not one that the plugin takes.
    Unsupported,
    /// Another one; the plan's message says which.
    Other,
}

impl Reason {
    /// The number that crosses the boundary.
    pub fn raw(self) -> i32 {
        match self {
            Self::None => KVH_REASON_NONE,
            Self::TooShort => KVH_REASON_TOO_SHORT,
            Self::NoGain => KVH_REASON_NO_GAIN,
            Self::QueriesMissing => KVH_REASON_QUERIES_MISSING,
            Self::NoRoom => KVH_REASON_NO_ROOM,
            Self::Unsupported => KVH_REASON_UNSUPPORTED,
            Self::Other => KVH_REASON_OTHER,
        }
    }
}

/// Why a sequence goes away: `KVH_FREE_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreeReason {
    /// It was finished.
    Finished,
    /// Its request was cancelled.
    Cancelled,
    /// It was preempted and will be computed again, under another uid.
    Preempted,
    /// The whole cache was reset.
    Reset,
    /// A reason that this version does not know.
    Unknown(i32),
}

impl From<i32> for FreeReason {
    fn from(raw: i32) -> Self {
        match raw {
            KVH_FREE_FINISHED => Self::Finished,
            KVH_FREE_CANCELLED => Self::Cancelled,
            KVH_FREE_PREEMPTED => Self::Preempted,
            KVH_FREE_RESET => Self::Reset,
            other => Self::Unknown(other),
        }
    }
}

/// What a layer's cache holds: `KVH_LAYER_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// Every token is visible to every later one.
    Full,
    /// Only the last `window` tokens are visible.
    SlidingWindow,
    /// Latent vectors (MLA).
    Latent,
    /// A recurrent state, no rows.
    Linear,
    /// No cache on this rank.
    None,
    /// A kind that this version does not know.
    Unknown(i32),
}

impl From<i32> for LayerKind {
    fn from(raw: i32) -> Self {
        match raw {
            KVH_LAYER_FULL => Self::Full,
            KVH_LAYER_SLIDING_WINDOW => Self::SlidingWindow,
            KVH_LAYER_LATENT => Self::Latent,
            KVH_LAYER_LINEAR => Self::Linear,
            KVH_LAYER_NONE => Self::None,
            other => Self::Unknown(other),
        }
    }
}
