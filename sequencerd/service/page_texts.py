"""The texts of the page to unsubscribe, by language."""

from __future__ import annotations

from typing import NamedTuple


class Texts(NamedTuple):
    """The texts in one language; `{address}` and `{topic}` are filled in."""

    title: str
    question: str
    this: str  # buttons
    everything: str
    undo: str
    ended_this: str
    ended_everything: str
    undone: str
    invalid: str
    unavailable: str


TEXTS = {
    "en": Texts(
        "Unsubscribe",
        "Which messages should {address} no longer receive?",
        "“{topic}” only",
        "All messages",
        "Undo",
        "{address} will no longer receive “{topic}”.",
        "{address} will no longer receive any messages from us.",
        "{address} will receive messages again.",
        "This link is not valid. Please use the whole link from the message.",
        "This is not possible at the moment. Please try again in a minute.",
    ),
    "de": Texts(
        "Abmelden",
        "Welche Nachrichten soll {address} nicht mehr erhalten?",
        "Nur „{topic}“",
        "Alle Nachrichten",
        "Rückgängig machen",
        "{address} erhält „{topic}“ nicht mehr.",
        "{address} erhält keine Nachrichten mehr von uns.",
        "{address} erhält wieder Nachrichten.",
        "Dieser Link ist nicht gültig. Bitte verwenden Sie den ganzen Link aus der Nachricht.",
        "Das ist im Moment nicht möglich. Bitte versuchen Sie es in einer Minute noch einmal.",
    ),
    "fr": Texts(
        "Se désabonner",
        "Quels messages ne doivent plus être envoyés à {address} ?",
        "Seulement « {topic} »",
        "Tous les messages",
        "Annuler",
        "{address} ne recevra plus « {topic} ».",
        "{address} ne recevra plus aucun message de notre part.",
        "{address} recevra de nouveau des messages.",
        "Ce lien n'est pas valable. Veuillez utiliser le lien complet du message.",
        "C'est impossible pour le moment. Veuillez réessayer dans une minute.",
    ),
    "es": Texts(
        "Darse de baja",
        "¿Qué mensajes no debe recibir más {address}?",
        "Solo «{topic}»",
        "Todos los mensajes",
        "Deshacer",
        "{address} ya no recibirá «{topic}».",
        "{address} ya no recibirá ningún mensaje nuestro.",
        "{address} volverá a recibir mensajes.",
        "Este enlace no es válido. Utilice el enlace completo del mensaje.",
        "No es posible en este momento. Inténtelo de nuevo dentro de un minuto.",
    ),
    "it": Texts(
        "Annulla l'iscrizione",
        "Quali messaggi non deve più ricevere {address}?",
        "Solo «{topic}»",
        "Tutti i messaggi",
        "Annulla la modifica",
        "{address} non riceverà più «{topic}».",
        "{address} non riceverà più alcun nostro messaggio.",
        "{address} riceverà di nuovo i messaggi.",
        "Questo link non è valido. Utilizzi il link completo del messaggio.",
        "Al momento non è possibile. Riprovi tra un minuto.",
    ),
    "nl": Texts(
        "Afmelden",
        "Welke berichten moet {address} niet meer ontvangen?",
        "Alleen “{topic}”",
        "Alle berichten",
        "Ongedaan maken",
        "{address} ontvangt “{topic}” niet meer.",
        "{address} ontvangt geen berichten meer van ons.",
        "{address} ontvangt weer berichten.",
        "Deze link is niet geldig. Gebruik de volledige link uit het bericht.",
        "Dat is op dit moment niet mogelijk. Probeer het over een minuut opnieuw.",
    ),
    "pt": Texts(
        "Cancelar a subscrição",
        "Que mensagens {address} não deve receber mais?",
        "Apenas «{topic}»",
        "Todas as mensagens",
        "Desfazer",
        "{address} deixará de receber «{topic}».",
        "{address} deixará de receber mensagens nossas.",
        "{address} voltará a receber mensagens.",
        "Esta ligação não é válida. Utilize a ligação completa da mensagem.",
        "De momento não é possível. Tente novamente dentro de um minuto.",
    ),
}
