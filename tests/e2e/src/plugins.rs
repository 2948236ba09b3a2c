//! Where the plugins lie that the tests load, and copies of them with one thing wrong.
//!
//! The tests depend on the plugins' crates, so cargo builds their shared libraries in the same run, beside the tests'
//! own programs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use kvhook_host::load::{Policy, Source};

/// The mark in `libkvhook_faulty.so` behind which the word of its variant stands, and the word's length.
const MARK: &[u8] = b"KVH_FAULTY_WORD=";
const WORD_BYTES: usize = 16;

/// The folder in which cargo put the plugins.
///
/// # Panics
/// When the running program has no folder.
pub fn built() -> PathBuf {
    let program = std::env::current_exe().expect("a running test has a path");
    program.parent().expect("a program lies in a folder").to_owned()
}

/// The content of a plugin's library: `noop`, `truncate`, `faulty`.
///
/// # Panics
/// When it is not there.
pub fn bytes(name: &str) -> Vec<u8> {
    let path = built().join(format!("libkvhook_{name}.so"));
    fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

/// `bytes` with every occurrence of `from` replaced by `to`, of the same length.
///
/// # Panics
/// When the lengths differ or there is none.
pub fn patched(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut found = false;
    let mut at = 0;
    while let Some(step) = bytes[at..].iter().position(|byte| *byte == from[0]) {
        at += step;
        if bytes[at..].starts_with(from) {
            bytes[at..at + to.len()].copy_from_slice(to);
            found = true;
        }
        at += 1;
    }
    assert!(found, "{:?} is not in the file", String::from_utf8_lossy(from));
    bytes
}

/// The faulty plugin in the variant with this word (`kvhook_faulty::variant::WORDS`).
///
/// # Panics
/// When the word is too long or the mark is missing.
pub fn variant(word: &str) -> Vec<u8> {
    let mut good = MARK.to_vec();
    good.extend(b"good............");
    let mut wanted = MARK.to_vec();
    wanted.extend(format!("{word:.<WORD_BYTES$}").bytes());
    patched(bytes("faulty"), &good, &wanted)
}

/// `bytes` with some more behind them that no other call of this program adds: the same plugin with a hash of its own,
/// which no other test has loaded.
pub fn unique(mut bytes: Vec<u8>) -> Vec<u8> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    bytes.extend(format!("unique {} {number}", std::process::id()).bytes());
    bytes
}

/// Folders for one test: one that plugins may come from, one for the host's private copies. Gone when dropped.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Place {
    /// Makes the folders.
    ///
    /// # Panics
    /// When they cannot be made.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(folder.path().join("plugins")).expect("a folder for plugins");
        Self { folder }
    }

    /// The folder of the test; plugins may not come from here.
    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// The folder that plugins may come from.
    pub fn plugins(&self) -> PathBuf {
        self.root().join("plugins")
    }

    /// The folder for private copies; the host makes it.
    pub fn copies(&self) -> PathBuf {
        self.root().join("copies")
    }

    /// The policy that allows [`Self::plugins`] alone.
    pub fn policy(&self) -> Policy {
        Policy { folders: vec![self.plugins()], copy_folder: self.copies(), safe_mode: false }
    }

    /// Puts a file into [`Self::plugins`]; gives its path.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.plugins().join(name);
        fs::write(&path, bytes).expect("the file can be written");
        path
    }

    /// Puts a plugin's content there and loads it by its path, as the operator would.
    ///
    /// # Errors
    /// The host's.
    pub fn load(&self, bytes: &[u8]) -> Result<std::sync::Arc<kvhook_host::load::Library>, kvhook_host::HostError> {
        let path = self.put("libkvhook_tested.so", bytes);
        kvhook_host::load::load(&self.policy(), &path.to_string_lossy(), Source::Operator, None)
    }
}

/// Changes a file's mode.
///
/// # Panics
/// When that is refused.
pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("the mode can be changed");
}
