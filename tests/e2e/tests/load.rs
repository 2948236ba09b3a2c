//! The part of the fault matrix that is about loading: each case ends in its own error number, with a message that
//! says what was found.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvhook_abi::raw::*;
use kvhook_e2e::plugins::{self, Place};
use kvhook_host::HostError;
use kvhook_host::instance::{HostTable, Instance, live_instances};
use kvhook_host::load::{self, ContentHash, Library, Outcome, Policy, Source, Step};
use kvhook_host::raw::*;
use kvhook_host::spec;

/// Checks an error's number, and that its message has some words.
#[track_caller]
fn assert_error<T>(result: Result<T, HostError>, status: KvhookStatus, words: &[&str]) {
    let Err(error) = result else { panic!("it succeeded; expected status {status}") };
    let message = error.to_string();
    assert_eq!(error.status(), status, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

fn operator(place: &Place, plugin: &str) -> Result<Arc<Library>, HostError> {
    load::load(&place.policy(), plugin, Source::Operator, None)
}

mod path {
    use super::*;

    #[test]
    fn plugins_are_found_by_name_beside_the_program() {
        let place = Place::new();
        let policy = Policy { folders: vec![plugins::built()], ..place.policy() };
        for name in ["noop", "truncate", "faulty"] {
            let library = load::load(&policy, name, Source::Model, None).unwrap();
            assert_eq!(library.id(), name);
        }
    }

    /// Runs itself again in another environment.
    #[test]
    fn defaults_come_from_the_environment() {
        const CHILD: &str = "KVHOOK_TEST_CHILD";
        let policy = Policy::new(Vec::new(), None);
        match std::env::var(CHILD).as_deref() {
            Ok("set") => {
                assert_eq!(policy.folders, [Path::new("/one"), Path::new("/two")]);
                assert_eq!(policy.copy_folder, Path::new("/cache/kvhook/plugins"));
                assert!(policy.safe_mode);
            }
            Ok(_) => {
                let built = plugins::built();
                let installed = built.parent().unwrap().join("lib/kvhook/plugins");
                assert_eq!(policy.folders, [built.join("deps"), built.clone(), installed]);
                assert_eq!(policy.copy_folder, Path::new("/me/.cache/kvhook/plugins"));
                assert!(!policy.safe_mode);
                let given = Policy::new(vec!["/given".into()], Some("/copies".into()));
                assert_eq!((given.folders, given.copy_folder), (vec!["/given".into()], "/copies".into()));
            }
            Err(_) => {
                let child = |kind: &str, variables: &[(&str, &str)]| {
                    let mut command = Command::new(std::env::current_exe().unwrap());
                    command.args(["--exact", "path::defaults_come_from_the_environment"]).env(CHILD, kind);
                    for name in ["KVHOOK_PLUGIN_PATH", "KVHOOK_SAFE_MODE", "XDG_CACHE_HOME"] {
                        command.env_remove(name);
                    }
                    let output = command.envs(variables.iter().copied()).output().unwrap();
                    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
                };
                child(
                    "set",
                    &[("KVHOOK_PLUGIN_PATH", "/one:/two"), ("KVHOOK_SAFE_MODE", "1"), ("XDG_CACHE_HOME", "/cache")],
                );
                child("unset", &[("KVHOOK_SAFE_MODE", "0"), ("HOME", "/me")]);
            }
        }
    }

    #[test]
    fn missing_file() {
        let place = Place::new();
        let error = operator(&place, "no-such");
        assert_error(error, KVHOOK_ERR_FILE_MISSING, &["plugins/libkvhook_no_such.so", "KVHOOK_PLUGIN_PATH"]);
        let path = place.plugins().join("nothing.so");
        assert_error(operator(&place, &path.to_string_lossy()), KVHOOK_ERR_FILE_MISSING, &["nothing.so"]);
    }

    #[test]
    fn unreadable_file() {
        let place = Place::new();
        let folder = place.plugins().join("folder.so");
        fs::create_dir(&folder).unwrap();
        assert_error(
            operator(&place, &folder.to_string_lossy()),
            KVHOOK_ERR_FILE_UNREADABLE,
            &["Directory", "regular"],
        );
        let huge = place.plugins().join("huge.so");
        fs::File::create(&huge).unwrap().set_len(load::MAX_PLUGIN_BYTES + 1).unwrap();
        assert_error(operator(&place, &huge.to_string_lossy()), KVHOOK_ERR_FILE_UNREADABLE, &["more than the limit"]);
        let fifo = place.plugins().join("fifo.so");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert_error(operator(&place, &fifo.to_string_lossy()), KVHOOK_ERR_FILE_UNREADABLE, &["Fifo"]);
    }

    #[test]
    fn outside_the_allowed_folders() {
        let place = Place::new();
        let outside = place.root().join("libkvhook_noop.so");
        fs::write(&outside, plugins::bytes("noop")).unwrap();
        let words = ["is not inside an allowed folder", "plugins"];
        assert_error(operator(&place, &outside.to_string_lossy()), KVHOOK_ERR_PATH_NOT_ALLOWED, &words);
        // Nor by going up again.
        let around = place.plugins().join("../libkvhook_noop.so");
        assert_error(operator(&place, &around.to_string_lossy()), KVHOOK_ERR_PATH_NOT_ALLOWED, &words);
        assert_error(operator(&place, "/no/such/file.so"), KVHOOK_ERR_PATH_NOT_ALLOWED, &words);
        // A folder whose name only begins alike is another one.
        let sibling = place.root().join("plugins-other");
        fs::create_dir(&sibling).unwrap();
        fs::write(sibling.join("a.so"), plugins::bytes("noop")).unwrap();
        assert_error(operator(&place, &sibling.join("a.so").to_string_lossy()), KVHOOK_ERR_PATH_NOT_ALLOWED, &words);
    }

    #[test]
    fn through_a_link() {
        let place = Place::new();
        let real = place.put("libkvhook_real.so", &plugins::bytes("noop"));
        symlink(&real, place.plugins().join("libkvhook_linked.so")).unwrap();
        let words = ["libkvhook_linked.so is a symbolic link"];
        assert_error(operator(&place, "linked"), KVHOOK_ERR_PATH_IS_LINK, &words);
        let path = place.plugins().join("libkvhook_linked.so");
        assert_error(operator(&place, &path.to_string_lossy()), KVHOOK_ERR_PATH_IS_LINK, &words);

        let outside = place.root().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("a.so"), plugins::bytes("noop")).unwrap();
        symlink(&outside, place.plugins().join("door")).unwrap();
        let path = place.plugins().join("door/a.so");
        assert_error(operator(&place, &path.to_string_lossy()), KVHOOK_ERR_PATH_IS_LINK, &["door is a symbolic link"]);
        // A real folder inside is fine.
        fs::create_dir(place.plugins().join("inner")).unwrap();
        fs::rename(&real, place.plugins().join("inner/a.so")).unwrap();
        assert!(operator(&place, &place.plugins().join("inner/a.so").to_string_lossy()).is_ok());
    }

    #[test]
    fn the_allowed_folder_itself_may_be_reached_through_a_link() {
        let place = Place::new();
        place.put("libkvhook_noop.so", &plugins::bytes("noop"));
        let link = place.root().join("link");
        symlink(place.plugins(), &link).unwrap();
        let policy = Policy { folders: vec![link.clone()], ..place.policy() };
        for plugin in [link.join("libkvhook_noop.so"), place.plugins().join("libkvhook_noop.so")] {
            assert!(load::load(&policy, &plugin.to_string_lossy(), Source::Operator, None).is_ok());
        }
    }

    #[test]
    fn a_model_may_name_no_path() {
        let place = Place::new();
        let path = place.put("libkvhook_noop.so", &plugins::bytes("noop"));
        for plugin in [&*path.to_string_lossy(), "./libkvhook_noop.so", "..", "noop.so", ""] {
            let result = load::load(&place.policy(), plugin, Source::Model, None);
            assert_error(result, KVHOOK_ERR_MODEL_PATH, &["only bare names"]);
        }
        assert!(load::load(&place.policy(), "noop", Source::Model, None).is_ok());
    }

    #[test]
    fn safe_mode_loads_nothing() {
        let place = Place::new();
        place.put("libkvhook_noop.so", &plugins::bytes("noop"));
        let policy = Policy { safe_mode: true, ..place.policy() };
        let result = load::load(&policy, "noop", Source::Operator, None);
        assert_error(result, KVHOOK_ERR_SAFE_MODE, &["KVHOOK_SAFE_MODE"]);
    }
}

mod content {
    use super::*;

    /// Opens and reads a file of the place, which is the first half of a load.
    fn read(place: &Place, path: &Path) -> load::PluginImage {
        let file = place.policy().open(&path.to_string_lossy(), Source::Operator).expect("the path is allowed");
        file.read().expect("nobody else writes the file")
    }

    #[test]
    fn replaced_between_check_and_load() {
        let place = Place::new();
        let original = plugins::unique(plugins::variant("good"));
        let path = place.put("libkvhook_a.so", &original);
        let image = read(&place, &path);
        let other = place.put("other.so", &plugins::unique(plugins::bytes("noop")));
        fs::rename(other, &path).unwrap();
        // What was checked is what is loaded.
        let library = load::load_image(&image, Some(ContentHash::of(&original)), &place.copies()).unwrap();
        assert_eq!((library.id(), library.hash()), ("faulty", ContentHash::of(&original)));
        assert_eq!(operator(&place, &path.to_string_lossy()).unwrap().id(), "noop");
    }

    #[test]
    fn written_to_between_open_and_read() {
        let place = Place::new();
        let path = place.put("libkvhook_a.so", &plugins::bytes("noop"));
        let file = place.policy().open("a", Source::Operator).unwrap();
        let mut longer = fs::read(&path).unwrap();
        longer.push(0);
        fs::write(&path, longer).unwrap();
        assert_error(file.read(), KVHOOK_ERR_FILE_CHANGED, &["changed between check and load", "renaming"]);
    }

    #[test]
    fn private_copy_tampered_with() {
        let place = Place::new();
        let path = place.put("libkvhook_a.so", &plugins::unique(plugins::variant("good")));
        let image = read(&place, &path);
        let copy = image.copy_to(&place.copies()).unwrap();
        assert_eq!(fs::read(&copy).unwrap(), image.bytes());
        assert_eq!(image.copy_to(&place.copies()).unwrap(), copy, "an unchanged copy is used again");
        plugins::set_mode(&copy, 0o700);
        fs::write(&copy, plugins::bytes("noop")).unwrap();
        let result = load::load_image(&image, None, &place.copies());
        assert_error(result, KVHOOK_ERR_FILE_CHANGED, &["private copy", "delete the copy"]);
        // A copy that others may write is as bad, whatever is in it.
        fs::write(&copy, image.bytes()).unwrap();
        plugins::set_mode(&copy, 0o722);
        assert_error(image.copy_to(&place.copies()), KVHOOK_ERR_FILE_CHANGED, &["mode is 722"]);
    }

    #[test]
    fn copy_folder_that_others_can_reach() {
        let place = Place::new();
        fs::create_dir(place.copies()).unwrap();
        plugins::set_mode(&place.copies(), 0o755);
        let result = place.load(&plugins::unique(plugins::bytes("noop")));
        assert_error(result, KVHOOK_ERR_COPY, &["mode is 755", "0700"]);
        let result = {
            fs::remove_dir(place.copies()).unwrap();
            fs::write(place.copies(), "not a folder").unwrap();
            place.load(&plugins::unique(plugins::bytes("noop")))
        };
        assert_error(result, KVHOOK_ERR_COPY, &["cannot be made"]);
    }

    #[test]
    fn pinned_content() {
        let place = Place::new();
        let bytes = plugins::bytes("noop");
        place.put("libkvhook_noop.so", &bytes);
        let load = |pin: ContentHash| load::load(&place.policy(), "noop", Source::Operator, Some(pin));
        let (right, wrong) = (ContentHash::of(&bytes), ContentHash::of(b"another"));
        assert_error(load(wrong), KVHOOK_ERR_CHECKSUM, &[&right.to_string(), &wrong.to_string(), "pinned"]);
        assert!(load(right).is_ok());
        // Also once it is loaded.
        assert_error(load(wrong), KVHOOK_ERR_CHECKSUM, &[]);
    }

    #[test]
    fn same_content_is_one_library_and_other_content_another() {
        let place = Place::new();
        let bytes = plugins::unique(plugins::bytes("noop"));
        let first = place.load(&bytes).unwrap();
        assert!(Arc::ptr_eq(&first, &place.load(&bytes).unwrap()));
        let second = place.load(&plugins::unique(plugins::bytes("noop"))).unwrap();
        assert_ne!(first.hash(), second.hash());
    }
}

mod elf {
    use super::*;

    #[test]
    fn not_an_elf() {
        let place = Place::new();
        assert_error(place.load(b""), KVHOOK_ERR_NOT_ELF, &["0 bytes"]);
        assert_error(place.load(b"#!/bin/sh\nexit 0\n"), KVHOOK_ERR_NOT_ELF, &["begins with", "shared library"]);
        let object = patched_at(plugins::bytes("noop"), 16, &[1, 0]);
        assert_error(place.load(&object), KVHOOK_ERR_NOT_ELF, &["object file"]);
        assert_error(place.load(&plugins::bytes("noop")[..100]), KVHOOK_ERR_NOT_ELF, &[]);
    }

    fn patched_at(mut bytes: Vec<u8>, at: usize, new: &[u8]) -> Vec<u8> {
        bytes[at..at + new.len()].copy_from_slice(new);
        bytes
    }

    #[test]
    fn wrong_architecture() {
        let place = Place::new();
        let bytes = plugins::bytes("noop");
        // IBM S/390: big-endian, and nothing that runs these tests.
        let machine = patched_at(bytes.clone(), 18, &22u16.to_le_bytes());
        assert_error(place.load(&machine), KVHOOK_ERR_WRONG_ARCHITECTURE, &["machine 22", "build the plugin for"]);
        let class = patched_at(bytes.clone(), 4, &[1]);
        assert_error(place.load(&class), KVHOOK_ERR_WRONG_ARCHITECTURE, &["not 64-bit"]);
        let order = patched_at(bytes, 5, &[2]);
        assert_error(place.load(&order), KVHOOK_ERR_WRONG_ARCHITECTURE, &["not little-endian"]);
    }

    #[test]
    fn entry_symbol() {
        let place = Place::new();
        let renamed = |to: &[u8]| plugins::patched(plugins::bytes("noop"), b"kvh_plugin_entry_v1", to);
        let none = renamed(b"kvh_plugin_entrx_v1");
        assert_error(place.load(&none), KVHOOK_ERR_NO_ENTRY, &["`kvh_plugin_entry_v1`", "not a kvhook plugin"]);
        let major = renamed(b"kvh_plugin_entry_v7");
        assert_error(place.load(&major), KVHOOK_ERR_WRONG_MAJOR, &["ABI major 7", "speaks 1"]);
    }

    #[test]
    fn a_missing_dependency() {
        let place = Place::new();
        let bytes = plugins::patched(plugins::bytes("noop"), b"libc.so.6", b"libq.so.6");
        assert_error(place.load(&bytes), KVHOOK_ERR_DLOPEN, &["libq.so.6", "ldd"]);
    }

    #[test]
    fn cut_anywhere_is_refused_without_a_panic() {
        let bytes = plugins::bytes("noop");
        for length in (0..bytes.len()).step_by(bytes.len() / 200 + 1) {
            assert!(load::inspect_bytes(&bytes[..length]).is_err(), "{length} bytes");
        }
    }
}

mod metadata {
    use super::*;

    #[test]
    fn broken() {
        let place = Place::new();
        let bytes = plugins::patched(plugins::bytes("noop"), b"KVHMETA1", b"KVHMETA0");
        assert_error(place.load(&bytes), KVHOOK_ERR_METADATA, &["KVHMETA0", ".kvh_meta"]);
        let bytes = plugins::patched(plugins::bytes("noop"), br#"{"id":"noop""#, br#"{"id":5.5e10"#);
        assert_error(place.load(&bytes), KVHOOK_ERR_METADATA, &["invalid type"]);
        let bytes = plugins::patched(plugins::bytes("noop"), b"\0.kvh_meta\0", b"\0.kvh_mata\0");
        assert_error(place.load(&bytes), KVHOOK_ERR_METADATA, &["no such section"]);
    }

    #[test]
    fn version() {
        let place = Place::new();
        let bytes = plugins::patched(plugins::bytes("noop"), br#""abi_major":1"#, br#""abi_major":3"#);
        assert_error(place.load(&bytes), KVHOOK_ERR_WRONG_MAJOR, &["ABI major 3", "rebuild"]);
        let bytes =
            plugins::patched(plugins::bytes("noop"), br#""required_host_minor":0"#, br#""required_host_minor":9"#);
        assert_error(place.load(&bytes), KVHOOK_ERR_NEWER_MINOR, &["requires a host of ABI 1.9", "update the host"]);
    }

    #[test]
    fn layout_names_the_field() {
        let place = Place::new();
        let bytes = plugins::bytes("noop");
        // One field of KvhPlan lies elsewhere, so the fingerprint is another too.
        let marker = br#"{"struct":"KvhPlan","#;
        let start = bytes.windows(marker.len()).position(|window| window == marker).unwrap();
        let end = start + bytes[start..].windows(3).position(|window| window == b"]]}").unwrap();
        let row = String::from_utf8(bytes[start..end].to_vec()).unwrap();
        let digit = row.find("0x").unwrap() + 2;
        let other = if &row[digit..=digit] == "0" { "1" } else { "0" };
        let mut wrong = row.replace(r#"["reason",12,4]"#, r#"["reason",13,4]"#);
        wrong.replace_range(digit..=digit, other);
        assert_ne!(row, wrong);
        let bytes = plugins::patched(bytes, row.as_bytes(), wrong.as_bytes());
        assert_error(place.load(&bytes), KVHOOK_ERR_LAYOUT, &["KvhPlan", "reason", "ABI 1.0", "rebuild"]);
    }
}

mod entry {
    use super::*;

    #[test]
    fn every_variant_ends_in_its_error() {
        let place = Place::new();
        let cases: [(&str, KvhookStatus, &[&str]); 17] = [
            ("major", KVHOOK_ERR_WRONG_MAJOR, &["ABI major 2", "speaks 1"]),
            ("minor", KVHOOK_ERR_NEWER_MINOR, &["requires a host of ABI 1.1", "this one is 1.0"]),
            ("fingerprint", KVHOOK_ERR_LAYOUT, &["KvhPlan", "rebuild"]),
            ("no-fingerprints", KVHOOK_ERR_LAYOUT, &["does not list"]),
            ("null-entry", KVHOOK_ERR_BAD_ENTRY, &["null"]),
            ("small-entry", KVHOOK_ERR_BAD_ENTRY, &["struct_size", "8"]),
            ("no-id", KVHOOK_ERR_BAD_ENTRY, &["`id` is empty"]),
            ("bad-id", KVHOOK_ERR_BAD_ENTRY, &["`id` is not UTF-8"]),
            ("other-id", KVHOOK_ERR_BAD_ENTRY, &["someone-else", "faulty"]),
            ("null-create", KVHOOK_ERR_NULL_FUNCTION, &["`create` of the entry"]),
            ("null-destroy", KVHOOK_ERR_NULL_FUNCTION, &["`destroy` of the entry"]),
            ("null-needs", KVHOOK_ERR_NULL_FUNCTION, &["`needs` of the entry"]),
            ("null-hook", KVHOOK_ERR_NULL_FUNCTION, &["`hook` of the entry"]),
            ("null-bound", KVHOOK_ERR_NULL_FUNCTION, &["`bound` of kvh.on_prefill_done/1"]),
            ("null-prefill", KVHOOK_ERR_NULL_FUNCTION, &["`on_prefill_done` of kvh.on_prefill_done/1"]),
            ("null-grown", KVHOOK_ERR_NULL_FUNCTION, &["`on_grown` of kvh.on_grown/1"]),
            ("null-free", KVHOOK_ERR_NULL_FUNCTION, &["`on_free` of kvh.on_free/1"]),
        ];
        for (word, status, words) in cases {
            assert_error(place.load(&plugins::variant(word)), status, words);
        }
        let before = place.load(&plugins::variant("null-before"));
        assert_error(before, KVHOOK_ERR_NULL_FUNCTION, &["`before_attention` of kvh.before_attention/1"]);
        assert!(place.load(&plugins::variant("good")).is_ok());
    }
}

mod looking {
    use super::*;

    #[test]
    fn inspect_reads_without_running() {
        let path = plugins::built().join("libkvhook_noop.so");
        let seen = load::inspect(&path).unwrap();
        assert_eq!((seen.id.as_str(), seen.abi_major, seen.abi_minor), ("noop", KVH_ABI_MAJOR, KVH_ABI_MINOR));
        assert_eq!(seen.hooks.len(), 4);
        assert!(seen.config_schema["properties"].is_object());
        assert!(seen.layouts.iter().all(|layout| layout.plugin.is_some() && layout.plugin == layout.host));
        assert_error(load::inspect(Path::new("/no/such.so")), KVHOOK_ERR_FILE_MISSING, &["/no/such.so"]);
    }

    #[test]
    fn checks_say_where_a_load_stops() {
        let place = Place::new();
        let good = place.put("good.so", &plugins::variant("good"));
        let checks = load::checks(&place.policy(), &good.to_string_lossy(), Source::Operator, None);
        assert_eq!(checks.len(), Step::ALL.len());
        assert!(checks.iter().all(|check| check.outcome == Outcome::Passed), "{checks:?}");

        let cases = [
            ("minor", Step::EntryVersion, "requires a host"),
            ("fingerprint", Step::Fingerprints, "KvhPlan"),
            ("null-create", Step::Functions, "`create`"),
            ("other-id", Step::Agreement, "someone-else"),
        ];
        for (word, stop, reason) in cases {
            let path = place.put("bad.so", &plugins::variant(word));
            let checks = load::checks(&place.policy(), &path.to_string_lossy(), Source::Operator, None);
            let at = checks.iter().position(|check| check.outcome == Outcome::Failed).unwrap();
            assert_eq!(checks[at].step, stop);
            assert!(checks[at].detail.contains(reason), "{}", checks[at].detail);
            assert!(checks[..at].iter().all(|check| check.outcome == Outcome::Passed));
            assert!(checks[at + 1..].iter().all(|check| check.outcome == Outcome::NotReached));
        }
    }
}

/// A host without services.
struct BareHost(KvhHost);

// SAFETY: the table is plain data that nobody writes.
unsafe impl Send for BareHost {}
// SAFETY: as above.
unsafe impl Sync for BareHost {}
// SAFETY: the table lives in the value, which stands still behind its `Arc`.
unsafe impl HostTable for BareHost {
    fn table(&self) -> *const KvhHost {
        &self.0
    }
}

unsafe extern "C" fn no_service(_: *mut KvhHostState, _: KvhStr) -> *const std::ffi::c_void {
    ptr::null()
}

fn bare_host() -> Arc<dyn HostTable> {
    Arc::new(BareHost(KvhHost {
        struct_size: size_of::<KvhHost>(),
        state: ptr::null_mut(),
        abi_major: KVH_ABI_MAJOR,
        abi_minor: KVH_ABI_MINOR,
        name: KvhStr::new("load test"),
        service: Some(no_service),
    }))
}

/// Makes an instance of a library for a small model, with nothing offered but `can`.
fn create_from(library: &Arc<Library>, config: &str, can: u64) -> Result<Instance, HostError> {
    let layer = || KvhLayerInfo {
        struct_size: size_of::<KvhLayerInfo>(),
        kind: KVH_LAYER_FULL,
        flags: 0,
        window: 0,
        shared_with: -1,
        kv_heads: 1,
        q_heads: 1,
        k_head_dim: 8,
        v_head_dim: 8,
    };
    let layers = [layer(), layer()];
    let model = KvhModel {
        struct_size: size_of::<KvhModel>(),
        name: KvhStr::new("tiny"),
        rank: 0,
        ranks: 1,
        total_kv_heads: 1,
        first_kv_head: 0,
        device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
        cache_dtype: KvhDtype { code: KVH_DTYPE_FLOAT, bits: 32, lanes: 1 },
        position_axes: 1,
        max_positions: 1024,
        rope_base: 10_000.0,
        rope_frequencies: ptr::null(),
        rotary_dim: 8,
        rope_pairing: KVH_ROPE_HALF_SPLIT,
        layers: KvhArray {
            data: layers.as_ptr().cast(),
            count: layers.len() as u64,
            stride: size_of::<KvhLayerInfo>() as u64,
        },
    };
    let offers = KvhOffers { struct_size: size_of::<KvhOffers>(), can, max_window_queries: 32, block_size: 0 };
    // SAFETY: everything lives until the call returns; there are no frequencies.
    unsafe { Instance::create(library, bare_host(), &model, &offers, config) }
}

fn create(config: &str, can: u64) -> Result<Instance, HostError> {
    let place = Place::new();
    let library = place.load(&plugins::variant("good")).expect("nothing is wrong with the library");
    create_from(&library, config, can)
}

/// Instances are counted in the whole process: one test at a time makes them.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

mod creating {
    use super::*;

    #[test]
    fn configs_that_are_refused() {
        let _alone = alone();
        let live = live_instances();
        let long = format!(r#"{{"create": "{}"}}"#, "x".repeat(1 << 20));
        let cases: [(&str, &[&str]); 7] = [
            ("crate=fail", &["unknown config key `crate`", "did you mean `create`"]),
            ("after=soon", &["`after`", "soon", "whole number"]),
            ("keep=1.5", &["`keep`", "1.5", "0.0 to 1.0"]),
            ("create=explode", &["`create`", "explode", "one of none, fail"]),
            ("{\"after\": [1]}", &["`after`", "[1]"]),
            ("{\"after\": 1", &["cannot be read"]),
            (&long, &["at most 65536"]),
        ];
        for (config, words) in cases {
            assert_error(create(config, 0), KVHOOK_ERR_CONFIG, words);
        }
        assert_eq!(live_instances(), live);
    }

    #[test]
    fn create_and_needs_fail_and_panic() {
        let _alone = alone();
        let live = live_instances();
        let cases: [(&str, KvhookStatus, &[&str]); 7] = [
            ("create=fail", KVHOOK_ERR_CREATE, &["`create` failed with status 7", "faulty: create goes wrong"]),
            ("create=out-of-memory", KVHOOK_ERR_CREATE, &["status 4"]),
            ("create=unsupported", KVHOOK_ERR_UNSUPPORTED, &["faulty: create goes wrong"]),
            ("create=panic", KVHOOK_ERR_CREATE_PANIC, &["`create` panicked", "faulty: create goes wrong"]),
            ("create=panic-twice", KVHOOK_ERR_CREATE_PANIC, &["`create` panicked"]),
            ("needs=panic", KVHOOK_ERR_CREATE_PANIC, &["`needs` panicked", "faulty: needs goes wrong"]),
            ("needs=panic-twice", KVHOOK_ERR_CREATE_PANIC, &["`needs` panicked"]),
        ];
        for (config, status, words) in cases {
            assert_error(create(config, 0), status, words);
        }
        assert_eq!(live_instances(), live, "an instance whose needs failed is destroyed");
    }

    #[test]
    fn needs_that_are_not_offered() {
        let _alone = alone();
        let cases: [(&str, u64, &[&str]); 7] = [
            ("must=2", 0, &["KVH_CAN_ALL_QUERIES", "without any prefix hit"]),
            ("must=36", KVH_CAN_LAYER_COUNTS, &["KVH_CAN_REWRITE", "fresh rows"]),
            ("phases=1", 0, &["KVH_CAN_QUERIES", "kvhook_before_attention"]),
            ("phases=1,window=33", KVH_CAN_QUERIES, &["the last 33 queries", "at most 32"]),
            ("phases=1,window=4294967295", KVH_CAN_QUERIES, &["KVH_CAN_ALL_QUERIES"]),
            ("every=5", 0, &["KVH_CAN_GROWN", "while it decodes"]),
            ("must=1099511627776", u64::MAX >> 32, &["0x10000000000", "does not know"]),
        ];
        for (config, can, words) in cases {
            assert_error(create(config, can), KVHOOK_ERR_NEED_NOT_OFFERED, words);
        }
        assert_error(create("phases=4", u64::MAX), KVHOOK_ERR_BAD_ENTRY, &["phases 0x4"]);
        assert_error(create("window=8", u64::MAX), KVHOOK_ERR_BAD_ENTRY, &["not for before_attention in prefill"]);
        let instance = create("phases=3,window=8,every=64,min_tokens=9", u64::MAX).unwrap();
        let needs = instance.needs();
        assert_eq!((needs.window_queries, needs.grown_every, needs.min_tokens), (8, 64, 9));
        assert!(needs.wants_layer(0) && needs.wants_layer(1) && !needs.wants_layer(64));
    }

    #[test]
    fn a_need_without_its_hook_and_a_success_without_an_instance() {
        let _alone = alone();
        let place = Place::new();
        let library = place.load(&plugins::variant("no-hooks")).unwrap();
        let words = ["`before_attention` of kvh.before_attention/1"];
        assert_error(create_from(&library, "phases=1", u64::MAX), KVHOOK_ERR_NULL_FUNCTION, &words);
        let words = ["`on_grown` of kvh.on_grown/1"];
        assert_error(create_from(&library, "every=1", u64::MAX), KVHOOK_ERR_NULL_FUNCTION, &words);
        let library = place.load(&plugins::variant("no-instance")).unwrap();
        assert_error(create_from(&library, "", 0), KVHOOK_ERR_BAD_ENTRY, &["without an instance"]);
    }

    #[test]
    fn a_panic_poisons_the_instance_and_it_is_still_destroyed() {
        let _alone = alone();
        let live = live_instances();
        let args = KvhOnFreeArgs {
            struct_size: size_of::<KvhOnFreeArgs>(),
            uid: 1,
            reason: KVH_FREE_FINISHED,
            reserved0: 0,
            stream: ptr::null_mut(),
        };
        for fault in ["panic", "panic-twice"] {
            let mut instance = create(&format!("free={fault},after=1"), 0).unwrap();
            // SAFETY: the arguments live until the call returns.
            let mut on_free = || unsafe { instance.on_free(&args) };
            assert_eq!(on_free(), Ok(()));
            assert_eq!(on_free().unwrap_err().status, KVH_ERR_PANIC);
            assert_eq!(on_free().unwrap_err().status, KVH_ERR_POISONED);
            assert!(instance.is_poisoned());
            drop(instance);
        }
        let mut instance = create("free=fail", 0).unwrap();
        // SAFETY: as above.
        let error = unsafe { instance.on_free(&args) }.unwrap_err();
        assert_eq!(error.status, KVH_ERR_INTERNAL);
        assert!(error.message.contains("faulty: on_free goes wrong"), "{error}");
        assert!(!instance.is_poisoned());
        drop(instance);
        drop(create("destroy=panic-twice", 0).unwrap());
        assert_eq!(live_instances(), live);
    }
}

#[test]
fn a_form_of_one_mebibyte_is_refused() {
    let long = format!(r#"{{"plugin": "noop", "config": "{}"}}"#, "x".repeat(1 << 20));
    assert_error(spec::parse(&long, Source::Operator), KVHOOK_ERR_SPEC, &["1048", "at most 65536"]);
}

/// A plugin built by another compiler loads: no Rust type crosses.
#[test]
fn built_by_another_compiler_version() {
    let nightly = Command::new("rustup").args(["run", "nightly", "rustc", "--version"]).output();
    let Some(version) = nightly.ok().filter(|output| output.status.success()) else {
        eprintln!("skipped: there is no nightly toolchain (`rustup toolchain install nightly`)");
        return;
    };
    let place = Place::new();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    // Kept between runs: only the first one is slow.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nightly");
    let build = Command::new("rustup")
        .args(["run", "nightly", "cargo", "build", "--offline", "--locked", "-p", "kvhook-noop", "--target-dir"])
        .arg(&target)
        .current_dir(workspace)
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("RUSTC")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .unwrap();
    assert!(build.status.success(), "{}", String::from_utf8_lossy(&build.stderr));
    let built = target.join("debug/libkvhook_noop.so");
    let library = place.load(&fs::read(&built).unwrap()).unwrap();
    assert_eq!(library.id(), "noop");
    let compiler = load::inspect(&built).unwrap().compiler;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    assert!(compiler.contains(&version) || version.contains(&compiler), "{compiler:?} and {version:?}");
    assert!(create_from(&library, "", KVH_CAN_QUERIES).is_ok());
}

/// What a command of `kvhook_control` may load, in a host whose plugins come from one folder.
mod live {
    use kvhook_e2e::model::{CONTIGUOUS, plugins as config_of};
    use kvhook_e2e::tiny;
    use kvhook_engine::hooks::Source;
    use kvhook_engine::{Error, Model, PluginConfig, Runner};

    use super::*;

    /// A host with the arm `a`, whose plugins come from the place.
    fn runner(place: &Place) -> Runner {
        place.put("libkvhook_truncate.so", &plugins::bytes("truncate"));
        let model = Arc::new(Model::load(&tiny::write(place.root(), 1)).expect("the model can be read"));
        let config = config_of(&[("a", "truncate", "keep=0.5")], place);
        Runner::with_plugins(model, CONTIGUOUS, &PluginConfig { folders: vec![place.plugins()], ..config })
            .expect("the arm can be made")
    }

    fn replace(runner: &Runner, plugin: &str, rest: &str, source: Source) -> Result<(), i32> {
        let command = format!(
            r#"{{"changes": [{{"weights": {{"a": 7}}}}, {{"replace": {{"name": "a", "plugin": "{plugin}"{rest}}}}}]}}"#
        );
        match runner.plugins().expect("it has plugins").control(&command, source) {
            Err(Error::Plugin { status, .. }) => Err(status),
            other => other.map_err(|error| panic!("{error}")),
        }
    }

    #[test]
    fn paths_and_links() {
        let _alone = alone();
        let place = Place::new();
        let runner = runner(&place);
        let before = runner.plugins().unwrap().arms_json().unwrap();
        let instances = live_instances();
        let refuses = |plugin: &str, source, status| {
            assert_eq!(replace(&runner, plugin, "", source), Err(status), "{plugin}");
            assert_eq!((runner.plugins().unwrap().arms_json().unwrap(), live_instances()), (before.clone(), instances));
        };
        let outside = place.root().join("outside.so");
        fs::write(&outside, plugins::bytes("noop")).unwrap();
        symlink(&outside, place.plugins().join("libkvhook_linked.so")).unwrap();
        symlink(place.root(), place.plugins().join("door")).unwrap();
        let inside = |name: &str| place.plugins().join(name).to_string_lossy().into_owned();
        let operator = Source::Operator;
        refuses(&outside.to_string_lossy(), operator, KVHOOK_ERR_PATH_NOT_ALLOWED);
        refuses(&inside("../outside.so"), operator, KVHOOK_ERR_PATH_NOT_ALLOWED);
        refuses("/etc/passwd", operator, KVHOOK_ERR_PATH_NOT_ALLOWED);
        refuses("linked", operator, KVHOOK_ERR_PATH_IS_LINK);
        refuses(&inside("libkvhook_linked.so"), operator, KVHOOK_ERR_PATH_IS_LINK);
        refuses(&inside("door/outside.so"), operator, KVHOOK_ERR_PATH_IS_LINK);
        refuses("missing", operator, KVHOOK_ERR_FILE_MISSING);
        place.put("libkvhook_text.so", b"#!/bin/sh");
        refuses("text", operator, KVHOOK_ERR_NOT_ELF);
        // From a network: no path at all, whatever it leads to.
        for plugin in [&*inside("libkvhook_truncate.so"), "./libkvhook_truncate.so", "plugins/x", "..", ""] {
            let status = if plugin.is_empty() { KVHOOK_ERR_SPEC } else { KVHOOK_ERR_MODEL_PATH };
            refuses(plugin, Source::Model, status);
        }
        refuses("linked", Source::Model, KVHOOK_ERR_PATH_IS_LINK);
        assert_eq!(replace(&runner, "truncate", r#", "config": "keep=0.25""#, Source::Model), Ok(()));
    }

    /// Someone puts another file in the place of the pinned one, again and again, by renaming and by writing. Whatever is
    /// there when the host looks, what it loads is what it hashed: either the pinned plugin, which takes this config, or
    /// none. The other one would refuse the config.
    #[test]
    fn a_file_that_is_replaced_all_the_time() {
        let _alone = alone();
        let place = Place::new();
        let runner = runner(&place);
        let (right, wrong) = (plugins::unique(plugins::bytes("truncate")), plugins::unique(plugins::bytes("noop")));
        let pin = ContentHash::of(&right);
        let path = place.put("libkvhook_x.so", &right);
        let rest = format!(r#", "config": "keep=0.25", "sha256": "{pin}""#);
        let done = std::sync::atomic::AtomicBool::new(false);
        let mut loaded = [0; 2];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0.. {
                    let bytes = if round % 2 == 0 { &wrong } else { &right };
                    if round % 3 == 0 {
                        fs::write(&path, bytes).unwrap();
                    } else {
                        let other = place.put("other", bytes);
                        fs::rename(other, &path).unwrap();
                    }
                    if done.load(std::sync::atomic::Ordering::SeqCst) {
                        break;
                    }
                }
            });
            let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
            // Until both were met, and often enough that what lies between them may have been, too.
            while (loaded.contains(&0) || loaded[0] + loaded[1] < 60) && std::time::Instant::now() < end {
                match replace(&runner, "x", &rest, Source::Operator) {
                    Ok(()) => loaded[1] += 1,
                    Err(KVHOOK_ERR_CHECKSUM | KVHOOK_ERR_FILE_CHANGED | KVHOOK_ERR_FILE_UNREADABLE) => loaded[0] += 1,
                    Err(other) => panic!("status {other}"),
                }
            }
            done.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        assert!(loaded[0] > 0, "{loaded:?}");
        println!("{} refused, {} loaded", loaded[0], loaded[1]);
    }
}
