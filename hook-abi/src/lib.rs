//! The kvhook contract: raw ABI types, the C header's source, and the safe author side.
