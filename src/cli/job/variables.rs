//! What a job's later steps are told, as variables.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::state::{Job, Volume};
use crate::cli::ending::When;
use crate::cli::mounting;
use crate::protocol::{Code, Failure};
use crate::sys;

/// Why a volume is not committed that is to be committed if it has no version.
pub const HAS_VERSION: &str = "there is a version already";

/// The part of a variable's name that stands for a volume.
pub fn suffix(volume: &str) -> String {
    let legal = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_uppercase()
        } else {
            '_'
        }
    };
    volume.chars().map(legal).collect()
}

/// Refuses volumes whose variables would have one name.
pub fn refuse_clash<'a>(volumes: impl Iterator<Item = &'a str> + Clone) -> Result<(), Failure> {
    for (at, volume) in volumes.clone().enumerate() {
        let same = |other: &&str| suffix(other) == suffix(volume);
        if let Some(other) = volumes.clone().take(at).find(same) {
            let message = format!("volumes {other} and {volume} would have the same variables");
            return Err(
                Failure::new(Code::Usage, message).hint("rename one: forkvol volume rename")
            );
        }
    }
    Ok(())
}

/// A name, and a value that need not be text: paths are in it.
type Variable = (String, Vec<u8>);

/// All variables of a job, with its document as JSON in one of them.
pub fn of(job: &Job, document: &Value) -> Vec<Variable> {
    let mut out = vec![
        ("FORKVOL_JOB".into(), job.job.clone().into()),
        ("FORKVOL_HIT".into(), job.hit().into()),
        ("FORKVOL_TRUST".into(), job.trust().into()),
        ("FORKVOL_JSON".into(), document.to_string().into()),
    ];
    for volume in &job.volumes {
        let name = suffix(&volume.volume);
        let mut put =
            |key: &str, value: Vec<u8>| out.push((format!("FORKVOL_{key}_{name}"), value));
        put("HIT", volume.hit.clone().into());
        put("FORK", volume.fork.clone().unwrap_or_default().into());
        put("VERSION", volume.base.clone().unwrap_or_default().into());
        put("DIR", folder(job, volume).as_os_str().as_bytes().to_vec());
        put(
            "COMMIT",
            match not_committed(job, volume) {
                None => b"yes".to_vec(),
                Some(why) => format!("no: {why}").into(),
            },
        );
    }
    out
}

/// Where a volume is, for who binds it elsewhere: what is at its only path, or its mount with a folder for each of several. Empty
/// where neither is there, unless the path is an empty folder: what else it holds is not the job's to hand on.
fn folder(job: &Job, volume: &Volume) -> PathBuf {
    let mount = volume.mount.as_ref().map(mounting::mount_path);
    match (mount, volume.paths.as_slice()) {
        (Some(mount), [only]) if only.link.is_some() => match &only.inner {
            Some(folder) => mount.join(folder),
            None => mount.into(),
        },
        (Some(mount), [] | [_, _, ..]) => mount.into(),
        (None, [first, ..]) if first.mount.is_some() => first.path.clone(),
        (_, [first, ..]) if is_empty_folder(job, &first.path) => first.path.clone(),
        _ => PathBuf::new(),
    }
}

/// Whether a path is a folder without anything in it, and in no fork but the job's.
fn is_empty_folder(job: &Job, path: &Path) -> bool {
    // First, for another fork's daemon may not answer.
    let may_be_read = match mounting::fork_mount_of(path) {
        Ok(found) => {
            let mut mounts = job.volumes.iter().flat_map(Volume::mounts);
            mounts.any(|mount| mounting::is_of(&found, mount))
        }
        Err(failure) => failure.code == Code::NotFound,
    };
    may_be_read && fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Why a volume will not be committed, as far as that is known while the job runs.
fn not_committed<'a>(job: &'a Job, volume: &'a Volume) -> Option<&'a str> {
    let lost = job.lost.then_some("the job has lost what it wrote before");
    let never = match volume.commit.unwrap_or(job.commit) {
        When::Never => Some("it is never committed"),
        When::IfMissing if volume.has_version => Some(HAS_VERSION),
        _ => None,
    };
    volume
        .degraded
        .as_deref()
        .or(volume.refused.as_deref())
        .or(never)
        .or(lost)
}

/// The variables for a shell.
pub fn for_shell(variables: &[Variable]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in variables {
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"='");
        for byte in value {
            match byte {
                b'\'' => out.extend_from_slice(br"'\''"),
                byte => out.push(*byte),
            }
        }
        out.extend_from_slice(b"'\n");
    }
    out
}

/// The variables as a file that GitHub's runner reads: the end of a value is a line that no value can hold.
fn for_github(variables: &[Variable]) -> io::Result<Vec<u8>> {
    let end = format!("forkvol-{:032x}", u128::from_ne_bytes(sys::random()?));
    let mut out = Vec::new();
    for (name, value) in variables {
        out.extend_from_slice(format!("{name}<<{end}\n").as_bytes());
        out.extend_from_slice(value);
        out.extend_from_slice(format!("\n{end}\n").as_bytes());
    }
    Ok(out)
}

/// Writes the variables into a file: added to what GitHub's runner reads, else in place of what is there.
pub fn write(path: &Path, variables: &[Variable]) -> Result<(), Failure> {
    let write = || match Kind::of(path)? {
        Kind::Github => open_github(path)?.write_all(&for_github(variables)?),
        Kind::Device => open_device(path)?.write_all(&for_shell(variables)),
        Kind::File => {
            let (mut file, aside) = open_aside(path)?;
            let written = file.write_all(&for_shell(variables));
            let written = written.and_then(|()| fs::rename(&aside, path));
            if written.is_err() {
                fs::remove_file(aside)?;
            }
            written
        }
    };
    write().map_err(|e| cannot_write(path, &e))
}

/// Fails if the variables cannot be written into a file, of which nothing is changed.
pub fn check(path: &Path) -> Result<(), Failure> {
    let check = || match Kind::of(path)? {
        Kind::Github => open_github(path).map(drop),
        Kind::Device => open_device(path).map(drop),
        Kind::File => fs::remove_file(open_aside(path)?.1),
    };
    check().map_err(|e| cannot_write(path, &e))
}

/// What variables are written to.
enum Kind {
    Github,
    /// As /dev/null is: it stays what it is.
    Device,
    File,
}

impl Kind {
    /// What is at a path. Who can put a link or a pipe there may not have this process write where the link leads, or wait.
    fn of(path: &Path) -> io::Result<Kind> {
        if std::env::var_os("GITHUB_ENV").is_some_and(|github| github == path.as_os_str()) {
            return Ok(Kind::Github);
        }
        let refused = |what| Err(io::Error::other(format!("{what}; name a file")));
        match fs::metadata(path) {
            Ok(there) if there.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(there) if !there.is_file() && path.is_symlink() => {
                return refused("it is a link to what is no file");
            }
            Ok(there) if there.file_type().is_char_device() => return Ok(Kind::Device),
            Ok(there) if !there.is_file() => return refused("it is no file"),
            _ => {}
        }
        Ok(Kind::File)
    }
}

fn open_github(path: &Path) -> io::Result<File> {
    File::options().append(true).open(path)
}

fn open_device(path: &Path) -> io::Result<File> {
    File::options().write(true).open(path)
}

/// A file beside, to take the place of this one: new, and this process's own, for the folder may be one that everybody writes to.
/// No other process has had the name, as one of the same number in another container may have.
fn open_aside(path: &Path) -> io::Result<(File, OsString)> {
    let bits = u64::from_ne_bytes(sys::random()?);
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".forkvol-{bits:016x}"));
    let mut options = File::options();
    let file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)?;
    Ok((file, aside))
}

fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    let message = format!("cannot write the variables to {}: {error}", path.display());
    Failure::new(Code::Failed, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_meant() {
        let hostile = "it's $HOME `id` \"x\"\nand a second line";
        let text = String::from_utf8(for_shell(&[("A".into(), hostile.into())])).unwrap();
        let out = std::process::Command::new("sh")
            .args(["-c", &format!("{text}printf %s \"$A\"")])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), hostile);
    }

    #[test]
    fn the_variables_go_through_no_name_that_another_file_shares() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        std::os::unix::fs::symlink("precious", dir.path().join("tmp.forkvol-new")).unwrap();
        // Left over by a process that was killed and had the same number.
        let left = format!("tmp.Xa7.forkvol-{}", std::process::id());
        fs::write(dir.path().join(left), "left").unwrap();
        let file = dir.path().join("tmp.Xa7");
        write(&file, &[("A".into(), "1".into())]).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "A='1'\n");
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    }

    #[test]
    fn a_device_stays_one_and_what_else_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| dir.path().join(name);
        let variables = [("A".into(), b"1".to_vec())];
        let null = Path::new("/dev/null");
        check(null).unwrap();
        write(null, &variables).unwrap();
        assert!(fs::metadata(null).unwrap().file_type().is_char_device());
        std::os::unix::fs::symlink(null, of("link")).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, of("pipe"), fifo, 0o600.into(), 0).unwrap();
        for name in ["link", "pipe", "."] {
            assert!(check(&of(name)).is_err(), "{name}");
            assert!(write(&of(name), &variables).is_err(), "{name}");
        }
        let left = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2, "nothing was put beside");
    }

    #[test]
    fn volumes_whose_variables_clash_are_refused() {
        assert!(refuse_clash(["a.b", "a_b"].into_iter()).is_err());
        assert!(refuse_clash(["a", "b"].into_iter()).is_ok());
        assert_eq!(suffix("shop/npm-cache"), "SHOP_NPM_CACHE");
    }
}
