//! What a job's later steps are told, as variables.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::Value;

use super::state::{Job, Volume};
use crate::cli::mounting;
use crate::protocol::{Code, Failure};
use crate::sys;

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
        put("DIR", folder(volume).as_os_str().as_bytes().to_vec());
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

/// Where a volume is: its mount, or the empty folder instead of it.
fn folder(volume: &Volume) -> &Path {
    match (&volume.mount, volume.paths.first()) {
        (Some(mount), _) => mounting::mount_path(mount),
        (None, Some(spot)) => &spot.path,
        (None, None) => Path::new(""),
    }
}

/// Why a volume will not be committed, as far as that is known while the job runs.
fn not_committed<'a>(job: &'a Job, volume: &'a Volume) -> Option<&'a str> {
    let when = volume.commit.unwrap_or(job.commit);
    let never = (when == crate::cli::ending::When::Never).then_some("it is never committed");
    volume
        .degraded
        .as_deref()
        .or(volume.refused.as_deref())
        .or(never)
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
    let mut bits = [0; 16];
    sys::random(&mut bits)?;
    let end = format!("forkvol-{:032x}", u128::from_ne_bytes(bits));
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
    let is_github = std::env::var_os("GITHUB_ENV").is_some_and(|github| github == path.as_os_str());
    let write = || match is_github {
        true => File::options()
            .append(true)
            .open(path)?
            .write_all(&for_github(variables)?),
        false => {
            // New, and this process's own: the folder may be one that everybody writes to. No other process has had the name,
            // as one of the same number in another container may have.
            let mut bits = [0; 8];
            sys::random(&mut bits)?;
            let mut aside = path.as_os_str().to_owned();
            aside.push(format!(".forkvol-{:016x}", u64::from_ne_bytes(bits)));
            File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&aside)?
                .write_all(&for_shell(variables))?;
            fs::rename(aside, path)
        }
    };
    write().map_err(|e| {
        let message = format!("cannot write the variables to {}: {e}", path.display());
        Failure::new(Code::Failed, message)
    })
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
    fn volumes_whose_variables_clash_are_refused() {
        assert!(refuse_clash(["a.b", "a_b"].into_iter()).is_err());
        assert!(refuse_clash(["a", "b"].into_iter()).is_ok());
        assert_eq!(suffix("shop/npm-cache"), "SHOP_NPM_CACHE");
    }
}
