//! The part of `kvhook.h` that cbindgen does not write: ids, helper macros, layout assertions, fingerprints.

use std::fmt::Write;

use kvhook_abi::ids::{IDS, KVH_ENTRY_SYMBOL, KVH_META_SECTION};
use kvhook_abi::layout::{LAYOUTS, StructLayout, Table};

/// Helper macros. `KVH_META` writes the length in the machine's order, which is the file's: lowest byte first.
const MACROS: &str = r#"/// Whether the struct at `pointer` is large enough to hold `field`, judged by its `struct_size`.
#define KVH_HAS(pointer, type, field) \
    ((pointer)->struct_size >= offsetof(type, field) + sizeof(((type *)0)->field))

/// Element `index` of a `KvhArray`, for reading.
#define KVH_AT(type, array, index) \
    ((const type *)((const char *)(array).data + (size_t)(index) * (size_t)(array).stride))

/// Element `index` of a `KvhArrayMut`.
#define KVH_AT_MUT(type, array, index) \
    ((type *)((char *)(array).data + (size_t)(index) * (size_t)(array).stride))

/// A `KvhStr` of a string literal, as an initialiser.
#define KVH_LITERAL(text) { (text), sizeof(text) - 1 }

/// Marks a plugin's entry: `KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void)`.
#ifdef __cplusplus
#define KVH_EXPORT extern "C" __attribute__((visibility("default")))
#define KVH_STATIC_ASSERT(condition, text) static_assert(condition, text)
#else
#define KVH_EXPORT __attribute__((visibility("default")))
#define KVH_STATIC_ASSERT(condition, text) _Static_assert(condition, text)
#endif

/// Puts a plugin's metadata, a JSON text as a string literal, where hosts look for it. Once in a library.
/// Members: id, version, abi_major, abi_minor, required_host_minor, hooks, may_need, language, compiler,
/// config_schema, and "layouts" with `KVH_LAYOUTS_JSON` as its value.
#define KVH_META(json) \
    __extension__ __attribute__((section("@section@"), used)) static const struct { \
        char magic[8]; \
        uint32_t length; \
        char text[sizeof(json)]; \
    } kvh_meta = { { 'K', 'V', 'H', 'M', 'E', 'T', 'A', '1' }, (uint32_t)(sizeof(json) - 1), json }

"#;

/// The text behind the types.
pub fn behind_types() -> String {
    let mut out = String::from("\n/// The one symbol that a plugin exports.\n");
    // Writing to a string cannot fail.
    let _ = writeln!(out, "#define KVH_ENTRY_SYMBOL \"{KVH_ENTRY_SYMBOL}\"\n\n/// Ids of hook points and services.");
    for (name, id) in IDS {
        let _ = writeln!(out, "#define {name} \"{id}\"");
    }
    out.push('\n');
    out.push_str(&MACROS.replace("@section@", KVH_META_SECTION));
    assertions(&mut out);
    fingerprints(&mut out);
    out
}

fn assertions(out: &mut String) {
    for StructLayout { name, size, fields, .. } in LAYOUTS {
        let _ = writeln!(out, "KVH_STATIC_ASSERT(sizeof({name}) == {size}, \"size of {name}\");");
        for field in *fields {
            let _ = writeln!(
                out,
                "KVH_STATIC_ASSERT(offsetof({name}, {0}) == {1}, \"offset of {name}.{0}\");",
                field.name, field.offset
            );
        }
    }
    out.push('\n');
}

fn fingerprints(out: &mut String) {
    let rows = Table::current().rows;
    out.push_str("/// Layout fingerprints, by struct and generation.\n");
    for (row, _) in &rows {
        let _ = writeln!(
            out,
            "#define KVH_FINGERPRINT_{}_{} UINT64_C({:#018x})",
            row.name, row.generation, row.fingerprint
        );
    }
    let _ = writeln!(out, "\n/// Elements of `KVH_FINGERPRINTS`.\n#define KVH_FINGERPRINT_COUNT {}", rows.len());
    out.push_str("\n/// Initialiser of a plugin's table: `static const KvhFingerprint table[] = KVH_FINGERPRINTS;`\n");
    out.push_str("#define KVH_FINGERPRINTS { \\\n");
    for (row, _) in &rows {
        let _ = writeln!(
            out,
            "    {{ KVH_LITERAL(\"{0}\"), {1}, 0, KVH_FINGERPRINT_{0}_{1} }}, \\",
            row.name, row.generation
        );
    }
    out.push_str(
        "}\n\n/// The structs' layouts as a JSON array, for `KVH_META`.\n#define KVH_LAYOUTS_JSON \\\n    \"[\" \\\n",
    );
    for (index, (row, _)) in rows.iter().enumerate() {
        let fields: Vec<String> =
            row.fields.iter().map(|(name, offset, size)| format!("[\\\"{name}\\\",{offset},{size}]")).collect();
        let _ = writeln!(
            out,
            "    \"{}{{\\\"struct\\\":\\\"{}\\\",\\\"generation\\\":{},\\\"size\\\":{},\\\"fingerprint\\\":\\\"{:#018x}\\\",\
             \\\"fields\\\":[{}]}}\" \\",
            if index == 0 { "" } else { "," },
            row.name,
            row.generation,
            row.size,
            row.fingerprint,
            fields.join(",")
        );
    }
    out.push_str("    \"]\"\n\n");
}
