//! Which files may be loaded, and how they are opened: a name or path comes in, an open file goes out.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, statat};
use rustix::io::Errno;

use super::file::PluginFile;
use crate::error::HostError;
use crate::raw::{KVHOOK_SOURCE_MODEL, KVHOOK_SOURCE_OPERATOR};

/// Who named a plugin. A path is honoured only from the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The operator's configuration or command line.
    Operator,
    /// A model's files, which are not trusted.
    Model,
}

impl Source {
    /// From `KVHOOK_SOURCE_*`.
    ///
    /// # Errors
    /// [`HostError::InvalidArgument`] for any other number.
    pub fn from_raw(source: i32) -> Result<Self, HostError> {
        match source {
            KVHOOK_SOURCE_OPERATOR => Ok(Self::Operator),
            KVHOOK_SOURCE_MODEL => Ok(Self::Model),
            other => Err(HostError::InvalidArgument {
                argument: "source",
                problem: format!("is {other}; expected 0 (operator) or 1 (model)"),
            }),
        }
    }
}

/// Where plugins may come from, and where their private copies go.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Folders in which bare names are looked up and from which paths are allowed, in order.
    pub folders: Vec<PathBuf>,
    /// Folder for private copies, made with mode 0700.
    pub copy_folder: PathBuf,
    /// No plugin is loaded at all.
    pub safe_mode: bool,
}

impl Policy {
    /// A policy from the operator's choices; what is empty comes from the environment:
    ///
    /// * folders: `KVHOOK_PLUGIN_PATH` (separated by colons), else `deps` in the program's folder (where cargo builds),
    ///   that folder, and `../lib/kvhook/plugins` beside it;
    /// * copy folder: `kvhook/plugins` in `XDG_CACHE_HOME` or `~/.cache`, else `kvhook-<uid>` in the folder for
    ///   temporary files;
    /// * safe mode: `KVHOOK_SAFE_MODE` is set, and not to `0`.
    pub fn new(folders: Vec<PathBuf>, copy_folder: Option<PathBuf>) -> Self {
        Self {
            folders: if folders.is_empty() { default_folders() } else { folders },
            copy_folder: copy_folder.unwrap_or_else(default_copy_folder),
            safe_mode: env::var_os("KVHOOK_SAFE_MODE").is_some_and(|value| !value.is_empty() && value != "0"),
        }
    }

    /// Opens the file of a plugin. A bare name (letters, digits, `-`, `_`) is looked up as `libkvhook_<name>.so` in the
    /// folders, `-` written as `_`. Anything else is a path: relative to the current folder, allowed only to the
    /// operator and only inside a folder. Below the folder no link is followed.
    ///
    /// # Errors
    /// `SafeMode`, `ModelPath`, `PathNotAllowed`, `PathIsLink`, `FileMissing`, `FileUnreadable`.
    pub fn open(&self, plugin: &str, source: Source) -> Result<PluginFile, HostError> {
        if self.safe_mode {
            return Err(HostError::SafeMode);
        }
        if is_bare_name(plugin) {
            return self.open_name(plugin);
        }
        match source {
            Source::Operator => self.open_path(Path::new(plugin)),
            Source::Model => Err(HostError::ModelPath { plugin: plugin.chars().take(200).collect() }),
        }
    }

    fn open_name(&self, name: &str) -> Result<PluginFile, HostError> {
        let file_name = OsString::from(format!("libkvhook_{}.so", name.replace('-', "_")));
        let mut looked_at = Vec::new();
        for folder in &self.folders {
            let path = folder.join(&file_name);
            let Ok(root) = open_folder(folder) else {
                looked_at.push(path);
                continue;
            };
            match open_beneath(root, folder, &[&file_name]) {
                Err(HostError::FileMissing { .. }) => looked_at.push(path),
                other => return other,
            }
        }
        Err(HostError::FileMissing { looked_at })
    }

    fn open_path(&self, given: &Path) -> Result<PluginFile, HostError> {
        let not_allowed = || HostError::PathNotAllowed { path: given.to_owned(), folders: self.folders.clone() };
        let path = std::path::absolute(given).map_err(|_| not_allowed())?;
        for folder in &self.folders {
            // The operator chose the folder, so it may itself be reached through links.
            let Ok(real) = folder.canonicalize() else { continue };
            let as_given = std::path::absolute(folder).unwrap_or_else(|_| real.clone());
            let Some(below) = [&real, &as_given].into_iter().find_map(|root| path.strip_prefix(root).ok()) else {
                continue;
            };
            let components: Option<Vec<&OsStr>> = below
                .components()
                .map(|component| match component {
                    Component::Normal(name) => Some(name),
                    _ => None,
                })
                .collect();
            let components = components.filter(|components| !components.is_empty()).ok_or_else(not_allowed)?;
            let root = open_folder(&real).map_err(|_| not_allowed())?;
            return open_beneath(root, &real, &components);
        }
        Err(not_allowed())
    }
}

/// Whether a plugin's name is a bare one, which is taken from a model too.
pub fn is_bare_name(plugin: &str) -> bool {
    !plugin.is_empty() && plugin.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

fn open_folder(folder: &Path) -> Result<OwnedFd, Errno> {
    openat(CWD, folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a file below `root`, one component after the other, none of which may be a link.
fn open_beneath(root: OwnedFd, root_path: &Path, components: &[&OsStr]) -> Result<PluginFile, HostError> {
    let mut folder = root;
    let mut path = root_path.to_owned();
    for (index, name) in components.iter().enumerate() {
        path.push(name);
        let last = index + 1 == components.len();
        let kind = if last {
            // A FIFO must not block us; it is refused as not regular once it is open.
            OFlags::NONBLOCK
        } else {
            OFlags::DIRECTORY
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | kind;
        match openat(&folder, *name, flags, Mode::empty()) {
            Ok(opened) if last => return PluginFile::new(File::from(opened), path),
            Ok(opened) => folder = opened,
            Err(error) => return Err(open_error(&folder, name, path, error)),
        }
    }
    Err(HostError::PathNotAllowed { path, folders: vec![root_path.to_owned()] })
}

fn open_error(folder: &OwnedFd, name: &OsStr, path: PathBuf, error: Errno) -> HostError {
    let is_link = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink);
    match error {
        _ if is_link => HostError::PathIsLink { link: path },
        Errno::NOENT | Errno::NOTDIR => HostError::FileMissing { looked_at: vec![path] },
        error => HostError::FileUnreadable { path, problem: std::io::Error::from(error).to_string() },
    }
}

fn default_folders() -> Vec<PathBuf> {
    if let Some(folders) = env::var_os("KVHOOK_PLUGIN_PATH").filter(|value| !value.is_empty()) {
        return env::split_paths(&folders).filter(|folder| !folder.as_os_str().is_empty()).collect();
    }
    let program = env::current_exe().ok();
    let Some(folder) = program.as_deref().and_then(Path::parent) else { return Vec::new() };
    // `deps` first: cargo puts a library beside the program only when it is asked for by name, and leaves it there to age.
    let mut folders = vec![folder.join("deps"), folder.to_owned()];
    if let Some(prefix) = folder.parent() {
        folders.push(prefix.join("lib/kvhook/plugins"));
    }
    folders
}

fn default_copy_folder() -> PathBuf {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(cache) = absolute("XDG_CACHE_HOME") {
        return cache.join("kvhook/plugins");
    }
    if let Some(home) = absolute("HOME") {
        return home.join(".cache/kvhook/plugins");
    }
    env::temp_dir().join(format!("kvhook-{}", rustix::process::geteuid().as_raw()))
}
