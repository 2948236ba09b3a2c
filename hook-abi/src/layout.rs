//! Layouts of the contract's structs, known at compile time, and the fingerprints made from them.
//!
//! `abi/v1.toml` is the table that reviewers read; `kvhook-codegen` keeps it equal to [`LAYOUTS`] and refuses any
//! change of a released row.

use crate::json::ConstJson;
use crate::raw::*;

mod check;
pub use check::{LayoutMismatch, PluginFingerprint, Row, Status, Table, check};

/// A field of a struct.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Generation of the struct that added it.
    pub since: u32,
    /// Bytes from the struct's start.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

/// Layout of a struct with all its generations.
#[derive(Clone, Copy, Debug)]
pub struct StructLayout {
    /// Its name.
    pub name: &'static str,
    /// Generations so far; each but the first only added fields at the end.
    pub generations: u32,
    /// Bytes of the newest generation.
    pub size: usize,
    /// Alignment in bytes.
    pub align: usize,
    /// Fields in order.
    pub fields: &'static [Field],
}

impl StructLayout {
    /// Fields of a generation: a prefix of all fields.
    pub const fn field_count(&self, generation: u32) -> usize {
        let mut count = 0;
        while count < self.fields.len() && self.fields[count].since <= generation {
            count += 1;
        }
        count
    }

    /// Bytes of a generation.
    pub const fn size_of_generation(&self, generation: u32) -> usize {
        let count = self.field_count(generation);
        if count == 0 {
            return 0;
        }
        self.fields[count - 1].offset + self.fields[count - 1].size
    }

    /// FNV-1a (64 bits) over name, size, alignment and, for each field, name, offset and size.
    /// Text is followed by a zero byte; numbers are 8 bytes, lowest first.
    pub const fn fingerprint(&self, generation: u32) -> u64 {
        let mut hash = Fnv::new();
        hash.text(self.name);
        hash.number(self.size_of_generation(generation) as u64);
        hash.number(self.align as u64);
        let mut i = 0;
        while i < self.field_count(generation) {
            hash.text(self.fields[i].name);
            hash.number(self.fields[i].offset as u64);
            hash.number(self.fields[i].size as u64);
            i += 1;
        }
        hash.0
    }

    /// Every byte belongs to a field, and every generation ends on the struct's alignment, so that no field
    /// can hide in another generation's padding.
    const fn is_dense(&self) -> bool {
        let mut end = 0;
        let mut i = 0;
        while i < self.fields.len() {
            let field = &self.fields[i];
            if field.offset != end {
                return false;
            }
            let begins_generation = i > 0 && field.since != self.fields[i - 1].since;
            if begins_generation && (field.since != self.fields[i - 1].since + 1 || !end.is_multiple_of(self.align)) {
                return false;
            }
            end += field.size;
            i += 1;
        }
        end == self.size && end.is_multiple_of(self.align)
    }
}

/// The FNV-1a hash (Fowler, Noll, Vo) with 64 bits.
struct Fnv(u64);

impl Fnv {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    const fn byte(&mut self, byte: u8) {
        self.0 = (self.0 ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3);
    }

    const fn text(&mut self, text: &str) {
        let bytes = text.as_bytes();
        let mut i = 0;
        while i < bytes.len() {
            self.byte(bytes[i]);
            i += 1;
        }
        self.byte(0);
    }

    const fn number(&mut self, value: u64) {
        let bytes = value.to_le_bytes();
        let mut i = 0;
        while i < bytes.len() {
            self.byte(bytes[i]);
            i += 1;
        }
    }
}

/// Size of what a pointer points to.
const fn size_of_target<T>(_pointer: *const T) -> usize {
    size_of::<T>()
}

/// Lists structs with their fields by generation. Leaving out a field does not compile (the pattern names
/// them all), nor does implicit padding. Structs marked `sized` begin with `struct_size`.
macro_rules! layouts {
    (@sized $name:ident sized) => {
        // SAFETY: the pattern below names `struct_size` first by the layout's density and the test
        // `sized_structs_begin_with_their_size`; every field is an integer, a float, a raw pointer, an optional
        // function or a struct of these, so zeroes are a value; density means that there is no padding.
        unsafe impl crate::boundary::Growing for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST_SIZE: usize = layout_of(stringify!($name)).size_of_generation(1);
        }
    };
    (@sized $name:ident plain) => {};
    ($($kind:ident $name:ident { $($since:literal: $($field:ident)+;)+ })+) => {
        /// Every struct that crosses the boundary, in the header's order.
        pub const LAYOUTS: &[StructLayout] = &[$({
            // Names every field: a field that is missing above is a compile error here.
            #[allow(dead_code)]
            fn all_fields_are_listed(value: &$name) {
                let $name { $($($field: _,)+)+ } = value;
            }
            let mut generations = 0;
            $(if $since > generations { generations = $since; })+
            let layout = StructLayout {
                name: stringify!($name),
                generations,
                size: size_of::<$name>(),
                align: align_of::<$name>(),
                fields: const { &[$($(Field {
                    name: stringify!($field),
                    since: $since,
                    offset: core::mem::offset_of!($name, $field),
                    size: {
                        let value = core::mem::MaybeUninit::<$name>::uninit();
                        // SAFETY: only the field's address is taken, inside `value`; nothing is read.
                        size_of_target(unsafe { &raw const (*value.as_ptr()).$field })
                    },
                },)+)+] },
            };
            assert!(layout.is_dense(), concat!(stringify!($name), " has implicit padding or generations out of order"));
            layout
        },)+];
        $(layouts!(@sized $name $kind);)+
    };
}

/// The layout of a struct of [`LAYOUTS`] by name.
///
/// # Panics
/// In const context only (so at compile time) when there is none.
const fn layout_of(name: &str) -> &'static StructLayout {
    let mut i = 0;
    while i < LAYOUTS.len() {
        if same(LAYOUTS[i].name, name) {
            return &LAYOUTS[i];
        }
        i += 1;
    }
    panic!("no such struct in LAYOUTS")
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

layouts! {
    plain KvhStr { 1: data length; }
    sized KvhText { 1: struct_size data capacity length; }
    plain KvhArray { 1: data count stride; }
    plain KvhArrayMut { 1: data count stride; }
    plain KvhDevice { 1: device_type device_id; }
    plain KvhDtype { 1: code bits lanes; }
    plain KvhTensor { 1: data device ndim dtype shape strides byte_offset; }
    plain KvhRows { 1: base stride_block stride_token stride_head stride_element head_dim dtype; }
    plain KvhBlockTable { 1: data stride_head count dtype; }
    plain KvhPositions { 1: data stride_head count; }
    sized KvhLayer {
        1: struct_size layer kind flags window shared_with kv_heads block_size reserved0 length k v table positions;
    }
    plain KvhSegment { 1: kind reserved0 start length; }
    plain KvhRange { 1: start length; }
    sized KvhSequence {
        1: struct_size uid epoch next_position prompt_length shared_rows queries_seen position_axes reserved0 segments
            layers;
    }
    sized KvhLayerInfo {
        1: struct_size kind flags window shared_with kv_heads q_heads k_head_dim v_head_dim;
    }
    sized KvhModel {
        1: struct_size name rank ranks total_kv_heads first_kv_head device cache_dtype position_axes max_positions
            rope_base rope_frequencies rotary_dim rope_pairing layers;
    }
    sized KvhOffers { 1: struct_size can max_window_queries block_size; }
    sized KvhNeeds {
        1: struct_size must before_attention_phases window_queries grown_every min_tokens layer_mask layer_mask_words;
    }
    sized KvhLayerPlan {
        1: struct_size count range_count indices index_stride_head ranges positions position_stride_head;
    }
    sized KvhPlan { 1: struct_size kind reason flags reserved0 next_position layers message; }
    sized KvhBoundArgs { 1: struct_size uid epoch next_position prompt_length lengths segments; }
    sized KvhBoundOut { 1: struct_size counts reason reserved0; }
    sized KvhPrepareArgs { 1: struct_size call sequences stream; }
    sized KvhPrepareOut { 1: struct_size plans; }
    sized KvhStepSequence {
        1: struct_size uid first_token tokens first_position prompt_length flags phase cache;
    }
    sized KvhBeforeAttentionArgs { 1: struct_size call layer reserved0 q k v sequences stream; }
    sized KvhOnFreeArgs { 1: struct_size uid reason reserved0 stream; }
    plain KvhOnPrefillDone1 { 1: bound on_prefill_done; }
    plain KvhOnGrown1 { 1: bound on_grown; }
    plain KvhBeforeAttention1 { 1: before_attention; }
    plain KvhOnFree1 { 1: on_free; }
    sized KvhLogRecord { 1: struct_size level line target message file; }
    plain KvhLog1 { 1: max_level write; }
    sized KvhAllocation { 1: struct_size kind reserved0 sequence bytes alignment; }
    plain KvhMemory1 { 1: allocate; }
    plain KvhRows1 { 1: lend; }
    sized KvhHost { 1: struct_size state abi_major abi_minor name service; }
    sized KvhCreateArgs { 1: struct_size host model offers config; }
    plain KvhFingerprint { 1: name generation reserved0 value; }
    sized KvhPluginEntry {
        1: struct_size abi_major abi_minor required_host_minor reserved0 id version fingerprints create destroy needs
            hook;
    }
}

/// Structs of which generations are released, with the newest released one. A released generation never
/// changes; all others are drafts, which need an exact match.
pub const RELEASED: &[(&str, u32)] = &[];

/// Number of rows: generations of all structs.
pub const ROW_COUNT: usize = {
    let mut count = 0;
    let mut i = 0;
    while i < LAYOUTS.len() {
        count += LAYOUTS[i].generations as usize;
        i += 1;
    }
    count
};

/// The fingerprints that this build of the crate knows, for a plugin's entry.
pub static FINGERPRINTS: crate::export::Static<[KvhFingerprint; ROW_COUNT]> = crate::export::Static::new({
    let mut rows = [KvhFingerprint { name: KvhStr::new(""), generation: 0, reserved0: 0, value: 0 }; ROW_COUNT];
    let mut at = 0;
    let mut i = 0;
    while i < LAYOUTS.len() {
        let mut generation = 1;
        while generation <= LAYOUTS[i].generations {
            rows[at] = KvhFingerprint {
                name: KvhStr::new(LAYOUTS[i].name),
                generation,
                reserved0: 0,
                value: LAYOUTS[i].fingerprint(generation),
            };
            at += 1;
            generation += 1;
        }
        i += 1;
    }
    rows
});

/// Writes the layouts as the metadata's JSON array:
/// `[{"struct":NAME,"generation":N,"size":N,"fingerprint":"0x...","fields":[[NAME,OFFSET,SIZE],...]},...]`.
pub const fn write_layouts(json: &mut ConstJson<'_>) {
    json.raw("[");
    let mut first = true;
    let mut i = 0;
    while i < LAYOUTS.len() {
        let layout = &LAYOUTS[i];
        let mut generation = 1;
        while generation <= layout.generations {
            json.raw(if first { "{" } else { ",{" });
            first = false;
            json.key("struct", true);
            json.text(layout.name);
            json.key("generation", false);
            json.number(generation as u64);
            json.key("size", false);
            json.number(layout.size_of_generation(generation) as u64);
            json.key("fingerprint", false);
            json.hex(layout.fingerprint(generation));
            json.key("fields", false);
            json.raw("[");
            let mut f = 0;
            while f < layout.field_count(generation) {
                json.raw(if f == 0 { "[" } else { ",[" });
                json.text(layout.fields[f].name);
                json.raw(",");
                json.number(layout.fields[f].offset as u64);
                json.raw(",");
                json.number(layout.fields[f].size as u64);
                json.raw("]");
                f += 1;
            }
            json.raw("]}");
            generation += 1;
        }
        i += 1;
    }
    json.raw("]");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_struct_of_the_contract_is_listed() {
        let source = include_str!("raw.rs");
        let mut declared: Vec<&str> = source
            .split("#[repr(C)]")
            .skip(1)
            .filter_map(|rest| rest.split_once("pub struct ")?.1.split(' ').next())
            .collect();
        let mut listed: Vec<&str> = LAYOUTS.iter().map(|layout| layout.name).collect();
        declared.sort_unstable();
        listed.sort_unstable();
        assert_eq!(declared, listed);
    }

    #[test]
    fn sized_structs_begin_with_their_size() {
        for layout in LAYOUTS {
            let sized = layout.fields.iter().position(|field| field.name == "struct_size");
            assert!(matches!(sized, None | Some(0)), "{}: struct_size is not the first field", layout.name);
        }
    }

    #[test]
    fn fnv_matches_published_vectors() {
        // From the FNV authors' test suite: FNV-1a 64 of "foobar" is 0x85944171f73967e8.
        let mut hash = Fnv::new();
        "foobar".bytes().for_each(|byte| hash.byte(byte));
        assert_eq!(hash.0, 0x8594_4171_f739_67e8);
    }

    #[test]
    fn fingerprint_follows_every_part_of_a_layout() {
        const A: Field = Field { name: "a", since: 1, offset: 0, size: 8 };
        const B: Field = Field { name: "b", since: 2, offset: 8, size: 8 };
        let layout = StructLayout { name: "S", generations: 2, size: 16, align: 8, fields: &[A, B] };
        let renamed = StructLayout { fields: &[Field { name: "c", ..A }, B], ..layout };
        let resized = StructLayout { fields: &[Field { size: 4, ..A }, B], ..layout };
        assert_ne!(layout.fingerprint(1), layout.fingerprint(2));
        assert_ne!(layout.fingerprint(1), renamed.fingerprint(1));
        assert_ne!(layout.fingerprint(1), resized.fingerprint(1));
        let first_only = StructLayout { generations: 1, size: 8, fields: &[A], ..layout };
        assert_eq!(layout.fingerprint(1), first_only.fingerprint(1), "a generation does not depend on later ones");
    }
}
