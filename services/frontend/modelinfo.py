"""`pagehold.v1.ModelService`: what is served, and how busy it is."""

from __future__ import annotations

from typing import Any

import grpc

import pagehold
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from services.frontend.errors import unavailable
from services.frontend.link import ExecutorLink
from services.frontend.validation import ServedModel, check_model


class ModelServicer(api_grpc.ModelServiceServicer):
    """Answers from what the executor last described."""

    def __init__(self, link: ExecutorLink) -> None:
        self._link = link

    async def ListModels(self, request: api.ListModelsRequest, context: Any) -> api.ListModelsResponse:
        return api.ListModelsResponse(models=[_describe(self._link.served())])

    async def GetModel(self, request: api.GetModelRequest, context: Any) -> api.GetModelResponse:
        model = self._link.served()
        check_model(request.name, model)
        return api.GetModelResponse(model=_describe(model))

    async def GetServerInfo(self, request: api.GetServerInfoRequest, context: Any) -> api.GetServerInfoResponse:
        described = self._link.served().described
        return api.GetServerInfoResponse(
            version=pagehold.__version__,
            device=described.device,
            dtype=described.dtype,
            kv_dtype=described.kv_dtype,
            deterministic=described.deterministic,
            speculation=described.speculation,
            epoch=described.epoch,
            page_size=described.page_size,
            pages=described.pages,
        )

    async def GetLoad(self, request: api.GetLoadRequest, context: Any) -> api.GetLoadResponse:
        self._link.served()
        try:
            load = await self._link.load()
        except grpc.aio.AioRpcError as error:
            raise unavailable("the executor is away; try again in a moment") from error
        return api.GetLoadResponse(
            running=load.running,
            waiting=load.waiting,
            free_pages=load.free_pages,
            pages=load.pages,
            prefill_tokens=load.prefill_tokens,
            decode_tokens=load.decode_tokens,
            preemptions=load.preemptions,
            draft_tokens=load.draft_tokens,
            accepted_tokens=load.accepted_tokens,
        )


def _describe(model: ServedModel) -> api.Model:
    described = model.described
    return api.Model(
        name=described.served_model_name,
        fingerprint=described.fingerprint,
        max_model_len=described.max_model_len,
        vocab_size=described.vocab_size,
        eos_token_ids=described.eos_token_ids,
        has_chat_template=model.tokenizer.has_template,
    )
