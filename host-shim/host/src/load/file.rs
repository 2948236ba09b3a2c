//! A plugin's file: opened once, read and hashed through that descriptor, copied to where only we can write.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, fsync, openat, renameat, unlinkat};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::error::HostError;

/// The largest plugin that is read, in bytes.
pub const MAX_PLUGIN_BYTES: u64 = 256 << 20;

/// SHA-256 of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// Of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

/// 64 lower-case hexadecimal digits.
impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for ContentHash {
    type Err = HostError;

    /// From 64 hexadecimal digits, of either case.
    fn from_str(text: &str) -> Result<Self, HostError> {
        let bad = || {
            let shown: String = text.chars().take(80).collect();
            HostError::Spec(format!("`sha256` is {shown:?}; expected 64 hexadecimal digits"))
        };
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let mut hash = [0; 32];
        for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
        }
        Ok(Self(hash))
    }
}

/// An open file that may become a plugin. Nothing reads its path again.
#[derive(Debug)]
pub struct PluginFile {
    file: File,
    path: PathBuf,
    opened: Identity,
}

impl PluginFile {
    /// Takes over an open file.
    ///
    /// # Errors
    /// `FileUnreadable` when it is not a regular file, is empty, or is larger than [`MAX_PLUGIN_BYTES`].
    pub(super) fn new(file: File, path: PathBuf) -> Result<Self, HostError> {
        let unreadable = |problem: String| HostError::FileUnreadable { path: path.clone(), problem };
        let stat = fstat(&file).map_err(|error| unreadable(io::Error::from(error).to_string()))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::RegularFile {
            return Err(unreadable(format!("it is a {kind:?}")));
        }
        let opened = Identity::of(&stat);
        if opened.size > MAX_PLUGIN_BYTES {
            return Err(unreadable(format!("it has {} bytes, more than the limit of {MAX_PLUGIN_BYTES}", opened.size)));
        }
        Ok(Self { file, path, opened })
    }

    /// Opens a file by any path, only to look at it.
    ///
    /// # Errors
    /// `FileMissing`, `FileUnreadable`.
    pub(super) fn open_to_inspect(path: &Path) -> Result<Self, HostError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match openat(CWD, path, flags, Mode::empty()) {
            Ok(file) => Self::new(file.into(), path.to_owned()),
            Err(Errno::NOENT) => Err(HostError::FileMissing { looked_at: vec![path.to_owned()] }),
            Err(error) => {
                Err(HostError::FileUnreadable { path: path.to_owned(), problem: io::Error::from(error).to_string() })
            }
        }
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads and hashes the content.
    ///
    /// # Errors
    /// `FileUnreadable`; `FileChanged` when the file was written to since it was opened.
    pub fn read(self) -> Result<PluginImage, HostError> {
        let unreadable =
            |error: io::Error| HostError::FileUnreadable { path: self.path.clone(), problem: error.to_string() };
        let mut bytes = Vec::new();
        let limit = self.opened.size + 1;
        (&self.file).take(limit).read_to_end(&mut bytes).map_err(unreadable)?;
        let now = Identity::of(&fstat(&self.file).map_err(|error| unreadable(error.into()))?);
        if now != self.opened || bytes.len() as u64 != self.opened.size {
            return Err(HostError::FileChanged {
                path: self.path,
                change: format!(
                    "{} bytes when it was opened, {} when it was read, or newly written",
                    self.opened.size, now.size
                ),
                advice: "install plugins by writing a new file and renaming it, then load again",
            });
        }
        let hash = ContentHash::of(&bytes);
        Ok(PluginImage { path: self.path, bytes, hash })
    }
}

/// What changes when a file's content does.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    size: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        // The field's types differ between systems.
        #[allow(clippy::unnecessary_cast)]
        Self { size: stat.st_size as u64, modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64) }
    }
}

/// A plugin's content. It is checked, copied and loaded; the file it came from does not matter any more.
#[derive(Debug)]
pub struct PluginImage {
    path: PathBuf,
    bytes: Vec<u8>,
    hash: ContentHash,
}

impl PluginImage {
    /// Where the file was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// SHA-256 of the content.
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// Compares with a pinned hash; no pin matches everything.
    ///
    /// # Errors
    /// `Checksum`.
    pub fn check_pin(&self, pin: Option<ContentHash>) -> Result<(), HostError> {
        match pin {
            Some(pinned) if pinned != self.hash => {
                Err(HostError::Checksum { found: self.hash.to_string(), pinned: pinned.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// Makes sure that `<sha256>.so` in `folder` holds the content and nobody else can write it. The folder is made
    /// with mode 0700; an existing copy is hashed again before it is used. Gives the copy's path.
    ///
    /// # Errors
    /// `Copy` when the folder is not ours alone or cannot be written; `FileChanged` when the copy that is there has
    /// another content.
    pub fn copy_to(&self, folder: &Path) -> Result<PathBuf, HostError> {
        let failed = |problem: String| HostError::Copy { folder: folder.to_owned(), problem };
        let (directory, real) = private_folder(folder).map_err(failed)?;
        let name = format!("{}.so", self.hash);
        let path = real.join(&name);
        if !self.matches_existing(&directory, &name, &path)? {
            self.write_copy(&directory, &name).map_err(|error| failed(error.to_string()))?;
        }
        Ok(path)
    }

    /// Whether the copy is there. One that has another content is an error.
    fn matches_existing(&self, directory: &OwnedFd, name: &str, path: &Path) -> Result<bool, HostError> {
        let changed = |change: String| HostError::FileChanged {
            path: path.to_owned(),
            change,
            advice: "something wrote into the private copy folder: find out what, delete the copy, load again",
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match openat(directory, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(false),
            Err(error) => return Err(changed(format!("it cannot be opened: {}", io::Error::from(error)))),
        };
        let stat = fstat(&file).map_err(|error| changed(io::Error::from(error).to_string()))?;
        if let Some(problem) = not_ours_alone(&stat) {
            return Err(changed(problem));
        }
        let mut content = Vec::new();
        file.take(MAX_PLUGIN_BYTES)
            .read_to_end(&mut content)
            .map_err(|error| changed(format!("it cannot be read: {error}")))?;
        let found = ContentHash::of(&content);
        if found != self.hash {
            return Err(changed(format!("the private copy's SHA-256 is now {found}")));
        }
        Ok(true)
    }

    /// Writes the copy under a name of its own and moves it into place, so that no half-written one is ever seen.
    fn write_copy(&self, directory: &OwnedFd, name: &str) -> io::Result<()> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = format!(".{name}.{}.{unique}", std::process::id());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(directory, &temporary, flags, Mode::RUSR | Mode::XUSR)?);
        let written = file
            .write_all(&self.bytes)
            .and_then(|()| Ok(fsync(&file)?))
            .and_then(|()| Ok(renameat(directory, &temporary, directory, name)?));
        if written.is_err() {
            // The write's error is the one to report.
            let _ = unlinkat(directory, &temporary, AtFlags::empty());
        }
        written
    }
}

/// Makes and opens the folder; gives it with its real path. It must belong to us and admit nobody else.
fn private_folder(folder: &Path) -> Result<(OwnedFd, PathBuf), String> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| format!("it cannot be made: {error}; name another copy folder"))?;
    let real = folder.canonicalize().map_err(|error| error.to_string())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(CWD, &real, flags, Mode::empty()).map_err(|error| io::Error::from(error).to_string())?;
    let stat = fstat(&directory).map_err(|error| io::Error::from(error).to_string())?;
    match not_ours_alone(&stat) {
        Some(problem) => Err(format!("{problem}; it must belong to us with mode 0700 (`chmod 700`)")),
        None => Ok((directory, real)),
    }
}

/// What is wrong with the owner or the mode, if anything.
fn not_ours_alone(stat: &Stat) -> Option<String> {
    let ours = rustix::process::geteuid().as_raw();
    if stat.st_uid != ours {
        return Some(format!("it belongs to user {}, not to us ({ours})", stat.st_uid));
    }
    let mode = stat.st_mode & 0o777;
    (mode & 0o077 != 0).then(|| format!("its mode is {mode:o}: others can reach it"))
}
