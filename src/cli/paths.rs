//! Which volume goes where: the order of -v and -p, and the folders that forks are put over.

use std::fs::{self, DirBuilder};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use clap::{ArgMatches, Args};

use super::forks::ForkFacts;
use super::mounting::refuse_dangerous;
use super::output;
use super::place::{Place, real_path};
use super::{ForkOptions, values};
use crate::fork::default_patterns_at;
use crate::protocol::{Code, Failure};
use crate::sys::process;

/// A path as it reads from anywhere; as it is where there is no current folder.
pub fn absolute(path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref();
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Whether one path lies in another, which it is not.
pub fn lies_in(inner: &Path, outer: &Path) -> bool {
    let (inner, outer) = (absolute(inner), absolute(outer));
    inner != outer && inner.starts_with(outer)
}

/// A volume and the paths that it is wanted at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    pub volume: String,
    pub paths: Vec<PathBuf>,
    /// Whether a lone path has a folder of its own in the volume too, as several have.
    pub folders: bool,
}

impl Wish {
    /// Whether its paths are folders of the volume, and not its root.
    pub fn has_folders(&self) -> bool {
        self.folders || self.paths.len() > 1
    }
}

/// The volumes of a job and where they are wanted, as options.
#[derive(Clone, Debug, Args)]
pub struct Volumes {
    /// A volume to fork; may be repeated
    #[arg(short = 'v', long = "volume", value_parser = values::volume)]
    volume: Vec<String>,
    /// Where the volume before it is put; may be repeated
    #[arg(short = 'p', long = "path", value_parser = values::path())]
    path: Vec<PathBuf>,
}

impl Volumes {
    /// Pairs them by their places on the command line.
    ///
    /// # Errors
    /// A path without a volume before it, or a volume named twice.
    pub fn wishes(&self, matches: Option<&ArgMatches>) -> Result<Vec<Wish>, Failure> {
        let places = |name: &str| -> Vec<usize> {
            let indices = matches.and_then(|m| m.indices_of(name));
            indices.into_iter().flatten().collect()
        };
        let volumes = places("volume")
            .into_iter()
            .zip(self.volume.iter().cloned());
        let paths = places("path").into_iter().zip(self.path.iter().cloned());
        pair(volumes.collect(), paths.collect())
    }
}

/// A path belongs to the volume before it. Both lists come with their places on the command line.
fn pair(volumes: Vec<(usize, String)>, paths: Vec<(usize, PathBuf)>) -> Result<Vec<Wish>, Failure> {
    let mut wishes: Vec<(usize, Wish)> = volumes
        .into_iter()
        .map(|(at, volume)| {
            (
                at,
                Wish {
                    volume,
                    paths: Vec::new(),
                    folders: false,
                },
            )
        })
        .collect();
    wishes.sort_by_key(|(at, _)| *at);
    for (at, path) in paths {
        match wishes.iter_mut().rfind(|(volume, _)| *volume < at) {
            Some((_, wish)) => wish.paths.push(path),
            None => {
                let message = format!("-p {} has no -v before it", path.display());
                return Err(Failure::new(Code::Usage, message));
            }
        }
    }
    let wishes: Vec<Wish> = wishes.into_iter().map(|(_, wish)| wish).collect();
    for (at, wish) in wishes.iter().enumerate() {
        if wishes
            .iter()
            .take(at)
            .any(|other| other.volume == wish.volume)
        {
            let message = format!("volume {} is named twice", wish.volume);
            return Err(Failure::new(Code::Usage, message).hint("give one -v several -p"));
        }
        refuse_nested(wish)?;
    }
    Ok(wishes)
}

/// Refuses paths of one volume that lie in each other: each would have a folder of its own in the volume, and the inner one be
/// hidden by the outer.
pub fn refuse_nested(wish: &Wish) -> Result<(), Failure> {
    if wish.has_folders() {
        for (at, path) in wish.paths.iter().enumerate() {
            let name = folder_name(path);
            if let Some(other) = wish.paths.iter().take(at).find(|p| folder_name(p) == name) {
                let message = format!(
                    "volume {} has {} and {}, which would share a folder of it",
                    wish.volume,
                    other.display(),
                    path.display()
                );
                return Err(
                    Failure::new(Code::Usage, message).hint("give one of them a volume of its own")
                );
            }
        }
    }
    for inner in &wish.paths {
        if let Some(outer) = wish.paths.iter().find(|outer| lies_in(inner, outer)) {
            let (inner, outer) = (inner.display(), outer.display());
            let message = format!("volume {} has {inner} within {outer}", wish.volume);
            return Err(Failure::new(Code::Usage, message).hint(format!(
                "{outer} alone holds both; or give {inner} a volume of its own"
            )));
        }
    }
    Ok(())
}

/// A folder that a fork, or a folder of one, is put over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The folder, without links.
    pub path: PathBuf,
    /// The folder of the volume that goes there; none for its root.
    pub folder: Option<String>,
}

/// Resolves the paths of a volume and makes what is missing of them.
pub fn targets(wish: &Wish, place: &Place) -> Result<Vec<Target>, Failure> {
    let paths = wish.paths.iter();
    paths.map(|path| target(wish, path, place)).collect()
}

/// Resolves one of the paths of a volume and makes what is missing of it.
pub fn target(wish: &Wish, path: &Path, place: &Place) -> Result<Target, Failure> {
    Ok(Target {
        folder: wish.has_folders().then(|| folder_name(path)),
        path: prepare(path, place)?,
    })
}

/// The options of a fork whose paths these are: where tools keep credentials there, no version gets them.
pub fn excluding(options: &ForkOptions, wish: &Wish) -> ForkOptions {
    let mut options = options.clone();
    if !options.no_default_exclude {
        let home = process::home();
        let home = home.map(|home| real_path(&home).unwrap_or(home));
        let own = wish.paths.iter().flat_map(|path| {
            let real = real_path(path).unwrap_or_else(|_| path.clone());
            let folder = wish.has_folders().then(|| folder_name(path));
            default_patterns_at(&real, folder.as_deref(), home.as_deref())
        });
        // What the caller says comes later, and wins.
        options.exclude.splice(0..0, own);
    }
    options
}

/// The folders that would have to be made for a path, outer ones first.
pub fn missing(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    let real = real_path(path).map_err(|e| {
        let message = format!("cannot use {}: {e}", path.display());
        Failure::new(Code::Failed, message)
    })?;
    let is_missing = |folder: &&Path| fs::symlink_metadata(folder).is_err();
    let mut missing: Vec<PathBuf> = real
        .ancestors()
        .take_while(is_missing)
        .map(Into::into)
        .collect();
    missing.reverse();
    Ok(missing)
}

fn prepare(path: &Path, place: &Place) -> Result<PathBuf, Failure> {
    let failed = |why: String| {
        Failure::new(
            Code::Failed,
            format!("cannot use {}: {why}", path.display()),
        )
    };
    let real = real_path(path).map_err(|e| failed(e.to_string()))?;
    refuse_to_lead_away(path, &real)?;
    refuse_dangerous(&real, place)?;
    refuse_to_hide_the_job(&real)?;
    match fs::metadata(&real) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(failed("it is not a folder".into())),
        Err(_) => DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&real)
            .map_err(|e| failed(e.to_string()))?,
    }
    Ok(real)
}

/// Refuses a path below the working folder that a link there leads out of it: whoever fills that folder, as a checkout does, would
/// choose what is covered.
fn refuse_to_lead_away(path: &Path, real: &Path) -> Result<(), Failure> {
    let is_below =
        path.is_relative() && !path.components().any(|part| part == Component::ParentDir);
    let here = std::env::current_dir().and_then(fs::canonicalize);
    if is_below && here.is_ok_and(|here| !real.starts_with(here)) {
        let message = format!(
            "cannot use {}: it leads to {}",
            path.display(),
            real.display()
        );
        return Err(
            Failure::new(Code::Policy, message).hint("remove the link, or name that folder itself")
        );
    }
    Ok(())
}

/// That a path would hide something that has to be seen.
pub fn not_covered(path: &Path, why: &str, hint: &str) -> Failure {
    let message = format!("{} may not be covered: {why}", path.display());
    Failure::new(Code::Policy, message).hint(hint)
}

/// Refuses a path that would hide what the job works on.
fn refuse_to_hide_the_job(path: &Path) -> Result<(), Failure> {
    let holds_job = std::env::current_dir().is_ok_and(|folder| folder.starts_with(path));
    let is_empty = || fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    if holds_job && !is_empty() {
        return Err(not_covered(
            path,
            "it holds the working folder, which is not empty",
            "name folders in it, or make it a fork before the checkout",
        ));
    }
    Ok(())
}

/// Where several paths share a volume each has a folder in it, named after the path as it was written, so that it is found again
/// from another working directory or home.
fn folder_name(path: &Path) -> String {
    let home = process::home();
    let path = home
        .and_then(|home| path.strip_prefix(home).ok())
        .unwrap_or(path);
    let parts: Vec<String> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(String::from_utf8_lossy(name.as_bytes()).into_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect();
    match parts.join("__").as_str() {
        "" => "cwd".into(),
        "." | ".." => "up".into(),
        name => name.into(),
    }
}

/// Makes a folder, and those above it that are missing, for this user alone.
pub fn make_folder(path: &Path) -> Result<(), Failure> {
    make(path, 0o700)
}

/// As [`make_folder`], for all to read.
pub fn make_folder_open(path: &Path) -> Result<(), Failure> {
    make(path, 0o755)
}

/// Makes the folder of a fork that is to be at a path. Whether there is none, because a read-only fork has nothing for the path:
/// that path stays as it is.
pub fn lacks(folder: &Path, fork: &ForkFacts, path: &Path) -> Result<bool, Failure> {
    if folder.is_dir() {
        return Ok(false);
    }
    if fork.read_only {
        let (path, volume) = (path.display(), &fork.volume);
        output::warn(&format!(
            "{path} is left as it is: {volume} is read-only and has nothing for it"
        ));
        return Ok(true);
    }
    make_folder_open(folder).map(|()| false)
}

fn make(path: &Path, mode: u32) -> Result<(), Failure> {
    DirBuilder::new()
        .mode(mode)
        .recursive(true)
        .create(path)
        .map_err(|e| {
            Failure::new(
                Code::Failed,
                format!("cannot make the folder {}: {e}", path.display()),
            )
        })
}

/// Refuses a path that is wanted twice, and puts outer folders before those within.
pub fn in_order<T>(mut targets: Vec<(Target, T)>) -> Result<Vec<(Target, T)>, Failure> {
    targets.sort_by(|(a, _), (b, _)| a.path.cmp(&b.path));
    for pair in targets.windows(2) {
        if let [(a, _), (b, _)] = pair
            && a.path == b.path
        {
            return Err(Failure::new(
                Code::Usage,
                format!("{} is named twice", a.path.display()),
            ));
        }
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(volume: &str, paths: &[&str]) -> Wish {
        Wish {
            volume: volume.into(),
            paths: paths.iter().map(PathBuf::from).collect(),
            folders: false,
        }
    }

    #[test]
    fn a_path_belongs_to_the_volume_before_it() {
        let volumes = vec![
            (1, "a".to_owned()),
            (4, "b".to_owned()),
            (5, "c".to_owned()),
        ];
        let paths = vec![(2, "x".into()), (3, "y".into()), (6, "z".into())];
        assert_eq!(
            pair(volumes, paths).unwrap(),
            [wish("a", &["x", "y"]), wish("b", &[]), wish("c", &["z"])]
        );
        assert!(pair(vec![(2, "a".into())], vec![(1, "x".into())]).is_err());
        assert!(pair(vec![(1, "a".into()), (2, "a".into())], Vec::new()).is_err());
        let nested = vec![(2, "x/sub".into()), (3, "./x".into())];
        let failure = pair(vec![(1, "a".into())], nested).unwrap_err();
        assert_eq!(failure.code, Code::Usage);
        assert_eq!(failure.message, "volume a has x/sub within ./x");
        let apart = vec![(2, "x".into()), (3, "xy".into()), (5, "x/sub".into())];
        assert!(pair(vec![(1, "a".into()), (4, "b".into())], apart).is_ok());
    }

    #[test]
    fn several_paths_have_a_folder_each() {
        let home = process::home().unwrap();
        for (path, name) in [
            (home.join(".cache/pip"), ".cache__pip"),
            ("/var/cache/apt".into(), "var__cache__apt"),
            ("./node_modules".into(), "node_modules"),
            (".".into(), "cwd"),
        ] {
            assert_eq!(folder_name(&path), name);
        }
    }

    #[test]
    fn outer_folders_come_first_and_none_twice() {
        let target = |path: &str| {
            (
                Target {
                    path: path.into(),
                    folder: None,
                },
                (),
            )
        };
        let sorted = in_order(vec![target("/a/b/c"), target("/z"), target("/a/b")]).unwrap();
        let paths: Vec<_> = sorted
            .iter()
            .map(|(t, ())| t.path.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["/a/b", "/a/b/c", "/z"]);
        assert!(in_order(vec![target("/a"), target("/a")]).is_err());
    }

    #[test]
    fn what_is_missing_is_made_and_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::Embedded {
            store: "/data/store".into(),
            named_by: "--store",
        };
        let path = dir.path().join("a/b");
        let targets = targets(
            &Wish {
                volume: "v".into(),
                paths: vec![path.clone()],
                folders: false,
            },
            &place,
        )
        .unwrap();
        assert!(path.is_dir());
        assert_eq!(targets[0].folder, None);
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(prepare(&dir.path().join("file"), &place).is_err());
        assert_eq!(
            prepare(Path::new("/tmp"), &place).unwrap_err().code,
            Code::Policy
        );
    }
}
