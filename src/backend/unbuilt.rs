//! The CUDA backend of a build without the feature `cuda`: a type without values.

use crate::abi::State;
use crate::config::{Config, Pass};
use crate::error::{Error, Result};
use crate::gradient::Tracked;
use crate::ranks::Sums;
use crate::table::{Buffer, Grouping, Table};
use crate::tensor::{Scale, StreamRef};

use super::{Backend, Memory, PendingSums};

/// Returns [`Error::NotBuilt`].
pub(crate) fn find(ordinal: i32) -> Result<()> {
    Err(Error::NotBuilt { backend: "CUDA", ordinal })
}

/// Cannot be made.
#[derive(Debug)]
pub(crate) enum Cuda {}

/// Cannot be made.
#[derive(Debug)]
pub(crate) enum PlanMemory {}

impl Cuda {
    pub(crate) fn new(ordinal: i32, _: Config, _: &State) -> Result<Self> {
        Err(Error::NotBuilt { backend: "CUDA", ordinal })
    }
}

impl Backend for Cuda {
    type Memory = PlanMemory;

    fn config(&self) -> &Config {
        match *self {}
    }

    fn grouping(&self) -> Grouping {
        match *self {}
    }

    fn memory(&self, _: &Table) -> Result<PlanMemory> {
        match *self {}
    }

    unsafe fn pass(&mut self, _: &Table, _: &PlanMemory, _: Pass, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn observe(&mut self, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn reweight(&mut self, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn reset(&mut self, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn set_weights(&mut self, _: &[f64], _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn set_grad_scale(&mut self, _: Scale) -> Result<()> {
        match *self {}
    }

    fn read(&self, _: StreamRef<'_>) -> Result<State> {
        match *self {}
    }

    fn write(&mut self, _: &State, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn pending_sums(&self) -> *mut f64 {
        match *self {}
    }

    fn sums<'a>(&'a mut self, _: StreamRef<'a>) -> Result<Sums<'a>> {
        match *self {}
    }

    fn record(&mut self, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn keep_sums(&mut self, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn kept_sums(&self, _: StreamRef<'_>) -> Result<PendingSums> {
        match *self {}
    }

    fn put_sums(&mut self, _: &[f64], _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn device_weights(&self) -> *const f32 {
        match *self {}
    }
}

impl Memory for PlanMemory {
    fn check_update(&self, _: impl Iterator<Item = Buffer>, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }

    fn check_tracked(&self, _: &[Tracked<'_>], _: Option<StreamRef<'_>>) -> Result<()> {
        match *self {}
    }

    fn submitted(&self, _: &[Tracked<'_>]) -> Result<()> {
        match *self {}
    }

    fn update(&self, _: &Table, _: StreamRef<'_>) -> Result<()> {
        match *self {}
    }
}
